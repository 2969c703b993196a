"""Detectors that say whether a trained model has a backdoor. One file each; names in `METHODS`."""

from bdfast.detectors.b3d import B3D
from bdfast.detectors.base import BlackBox, Detector, Finding
from bdfast.detectors.calibration import Calibration, FalseAlarms
from bdfast.detectors.detection import calibrate, detect
from bdfast.detectors.detection_result import Detection
from bdfast.detectors.ebyd import EBYD
from bdfast.detectors.exposed_network import agrees, exposed, flagged
from bdfast.detectors.mm_bd import MMBD
from bdfast.detectors.neural_cleanse import NeuralCleanse
from bdfast.detectors.surrogate import SurrogateDetector

METHODS: dict[str, type[Detector]] = {
    "surrogate": SurrogateDetector,
    "neural_cleanse": NeuralCleanse,
    "mm_bd": MMBD,
    "b3d": B3D,
    "ebyd": EBYD,
}

__all__ = [
    "B3D",
    "EBYD",
    "METHODS",
    "MMBD",
    "BlackBox",
    "Calibration",
    "Detection",
    "Detector",
    "FalseAlarms",
    "Finding",
    "NeuralCleanse",
    "SurrogateDetector",
    "agrees",
    "calibrate",
    "detect",
    "exposed",
    "flagged",
]
