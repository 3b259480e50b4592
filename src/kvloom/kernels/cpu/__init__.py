"""The CPU kernels in C++: attention over lanes, products with packed weights, fused steps. They take pointers."""

from kvloom.kernels.cpu.attention import Lanes, LayerShape, append, attention, key_mass, key_mass_of_layers
from kvloom.kernels.cpu.decoder import NormWeights, StepDecoder
from kvloom.kernels.cpu.experts import Experts, Routing
from kvloom.kernels.cpu.linear import MXFP4_PRODUCTS, PRODUCTS, PackedWeight, linear
from kvloom.kernels.cpu.machine import (
    available_isas,
    force_isa,
    isa,
    peak_flops,
    read_bandwidth,
)
from kvloom.kernels.cpu.rows import argmax, gate, layer_norm, rms_norm
from kvloom.kernels.cpu.slots import copy_slots, encode_blocks, read_slots, write_slots
from kvloom.kernels.cpu.threads import num_threads, set_num_threads

__all__ = [
    "MXFP4_PRODUCTS",
    "PRODUCTS",
    "Experts",
    "Lanes",
    "LayerShape",
    "NormWeights",
    "PackedWeight",
    "Routing",
    "StepDecoder",
    "append",
    "argmax",
    "attention",
    "available_isas",
    "copy_slots",
    "encode_blocks",
    "force_isa",
    "gate",
    "isa",
    "key_mass",
    "key_mass_of_layers",
    "layer_norm",
    "linear",
    "num_threads",
    "peak_flops",
    "read_bandwidth",
    "read_slots",
    "rms_norm",
    "set_num_threads",
    "write_slots",
]
