"""The calibrated second system: 4-bit codes for groups of weights, chosen by the output of a layer."""
