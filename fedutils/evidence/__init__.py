"""From predictions to tables to sentences. It reads a run folder and plans no training."""
