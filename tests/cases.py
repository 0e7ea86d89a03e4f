"""Schedules and predictions that several tests go through."""

from functools import partial

from diffusion import predictions, schedules

SCHEDULES = {
    "linear": schedules.linear(),
    "scaled_linear": schedules.scaled_linear(),
    "cosine": schedules.cosine(),
    "sigmoid": schedules.sigmoid(),
    "zero_terminal_snr": schedules.zero_terminal_snr(schedules.scaled_linear()),
    "vp_sde": schedules.VPSDE(),
    "sub_vp_sde": schedules.SubVPSDE(),
    "ve": schedules.VE(),
    "edm": schedules.EDM(),
    "rectified_flow": schedules.RectifiedFlow(),
    "trigonometric_flow": schedules.TrigonometricFlow(),
    "shifted_flow": schedules.RectifiedFlow().shifted(3.0),
    "shifted_cosine": schedules.cosine().shifted(2.0),
    "shifted_twice": schedules.RectifiedFlow().shifted(0.5).shifted(4.0),
    "shifted_vp_sde": schedules.VPSDE().shifted(3.0),
    "moved_table": schedules.Shifted(schedules.linear(), 0.5),
}

VARIANCE_PRESERVING = [
    *("linear", "scaled_linear", "cosine", "sigmoid", "zero_terminal_snr", "vp_sde"),
    *("trigonometric_flow", "shifted_cosine"),
]

PREDICTIONS = {
    "eps": predictions.eps,
    "x0": predictions.x0,
    "v": predictions.v,
    "flow": predictions.flow,
    "edm": partial(predictions.edm, sigma_data=0.7),
}
