"""Patient-level differential privacy: the client, its gradients, what they cost, what is spent."""
