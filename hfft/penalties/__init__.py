"""Penalties R(theta, theta_s): pure functions, and the kinds that configs name.

Importing this registers the kinds that come with hfft.
"""

from hfft.penalties.alignment import DELTA
from hfft.penalties.kinds import L2SP, Cosine, Euclidean, Fisher, WeightPenalty
from hfft.penalties.orthogonality import Orthogonal
from hfft.penalties.penalty import Attachment, Penalty, Setting, register
from hfft.penalties.selective import SPD
from hfft.penalties.shrinkage import BSS
from hfft.penalties.weights import cosine, euclidean, fisher, l2_sp, orthogonal

__all__ = [
    "BSS",
    "DELTA",
    "L2SP",
    "SPD",
    "Attachment",
    "Cosine",
    "Euclidean",
    "Fisher",
    "Orthogonal",
    "Penalty",
    "Setting",
    "WeightPenalty",
    "cosine",
    "euclidean",
    "fisher",
    "l2_sp",
    "orthogonal",
    "register",
]
