"""The usual hand-written loop, as notebooks of this kind have it, on the same films.

Every epoch each film is opened, decoded and resized in the training process; the frozen trunk runs
forward every time; a new model is built for each client and round; state dicts are averaged.
"""

import copy
import time

import pandas as pd
import torch
import workload
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.models import resnet34

from fedutils.dataset import IMAGENET_MEAN, IMAGENET_STD
from fedutils.films.phantom.cases import FINDINGS


class Films(Dataset):
    """Opens the PNG each time it is asked for; adds up the seconds that takes."""

    def __init__(self, table: pd.DataFrame, size: int) -> None:
        self.paths = table["path"].tolist()
        self.labels = torch.tensor(table[list(FINDINGS)].to_numpy("float32"))
        steps = [transforms.Resize((size, size)), transforms.ToTensor()]
        steps.append(transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD))
        self.transform, self.seconds = transforms.Compose(steps), 0.0

    def __len__(self) -> int:
        """Count the films."""
        return len(self.paths)

    def __getitem__(self, position: int) -> tuple[Tensor, Tensor]:
        """Decode one film, float32 (3, size, size), with its labels."""
        began = time.perf_counter()
        film = self.transform(Image.open(self.paths[position]).convert("RGB"))
        self.seconds += time.perf_counter() - began
        return film, self.labels[position]


def new_model(state: dict[str, Tensor]) -> nn.Module:
    """Build a network, load the global weights, and freeze all but layer4 and fc."""
    model = resnet34(weights=None)
    model.fc = nn.Linear(model.fc.in_features, len(FINDINGS))
    model.load_state_dict(state)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.startswith(("layer4", "fc"))
    return model


def train_client(model: nn.Module, loader: DataLoader, epochs: int) -> None:
    """Train the local epochs."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=workload.RATE, momentum=workload.MOMENTUM)
    criterion = nn.BCEWithLogitsLoss()
    model.train()
    for _ in range(epochs):
        for films, labels in loader:
            optimizer.zero_grad()
            loss = criterion(model(films), labels)
            loss.backward()
            optimizer.step()


def average(states: list[dict[str, Tensor]], weights: list[int]) -> dict[str, Tensor]:
    """Average the state dicts, weighted by films."""
    mean = copy.deepcopy(states[0])
    for name, value in mean.items():
        terms = [state[name] * (w / sum(weights)) for state, w in zip(states, weights, strict=True)]
        mean[name] = sum(terms).to(value.dtype)
    return mean


def main(films: str, weights: str, size: int, batch: int, rounds: int, epochs: int) -> None:
    """Train from the films on disk (a table with path, client, labels) to the last round."""
    torch.set_num_threads(workload.THREADS)
    table = pd.read_csv(films)
    clients = [Films(part, size) for _, part in table.groupby("client")]
    state, laps = torch.load(weights, weights_only=True), workload.Laps()
    for _ in range(rounds):
        states = []
        for client in clients:
            model = new_model(state)
            train_client(model, DataLoader(client, batch_size=batch, shuffle=True), epochs)
            states.append(model.state_dict())
        state = average(states, [len(client) for client in clients])
        laps.lap()
    workload.report(rounds=laps.seconds, decoding=sum(client.seconds for client in clients))


if __name__ == "__main__":
    main(**workload.arguments())
