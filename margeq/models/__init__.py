"""Whole networks."""

from margeq.models.all_cnn import all_cnn_c
from margeq.models.augmented import AugmentedInputs
from margeq.models.digits import digit_network
from margeq.models.ella import ella
from margeq.models.group_digits import group_digit_network
from margeq.models.macs import count_macs
from margeq.models.partial_cnn import partial_cnn
from margeq.models.partial_cnn13 import PartialCNN13
from margeq.models.partial_resnet import PartialResNet
from margeq.models.resnet import resnet44
from margeq.models.rotmnist import rotmnist_cnn

__all__ = [
    "AugmentedInputs",
    "PartialCNN13",
    "PartialResNet",
    "all_cnn_c",
    "count_macs",
    "digit_network",
    "ella",
    "group_digit_network",
    "partial_cnn",
    "resnet44",
    "rotmnist_cnn",
]
