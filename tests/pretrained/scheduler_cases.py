"""Each class's options, one or two at a time: what is run against diffusers."""

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
V = {"prediction_type": "v_prediction"}
X0 = {"prediction_type": "sample"}
ZERO_SNR = {"rescale_betas_zero_snr": True, **V}
COSINE = {"beta_schedule": "squaredcos_cap_v2"}
SHORT = {"num_train_timesteps": 100}
TRAINED = {"num_train_timesteps": 20, "trained_betas": [0.01 * (k + 1) for k in range(20)]}
NO_CLIP = {"clip_sample": False}
THRESHOLD = {"thresholding": True, "sample_max_value": 3.0}
LOW_THRESHOLD = {"thresholding": True, "dynamic_thresholding_ratio": 0.7, "sample_max_value": 0.9}
LEADING = {"timestep_spacing": "leading", "steps_offset": 1}
TRAILING = {"timestep_spacing": "trailing"}
LINSPACE = {"timestep_spacing": "linspace"}
KARRAS, EXPONENTIAL, BETA = (
    {f"use_{kind}_sigmas": True} for kind in ("karras", "exponential", "beta")
)
LU = {"use_lu_lambdas": True}
SIGMA_MIN = {"final_sigmas_type": "sigma_min"}
NOISE = {"algorithm_type": "dpmsolver", **SIGMA_MIN}
SDE = {"algorithm_type": "sde-dpmsolver++"}
SDE_NOISE = {"algorithm_type": "sde-dpmsolver", **SIGMA_MIN}
HEUN = {"solver_type": "heun"}
FLOW = {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"}
DYNAMIC = {"use_dynamic_shifting": True}


def order(k):
    return {"solver_order": k}


# class -> cases, each (config, steps, arguments)
CASES = {
    "DDPMScheduler": [
        ({}, 10, {}),
        ({**NO_CLIP, **SD}, 7, {}),
        ({**NO_CLIP, **V, **LINSPACE}, 7, {}),
        ({**NO_CLIP, **X0, **TRAILING}, 13, {}),
        ({**NO_CLIP, **LEADING, **SD}, 10, {}),
        ({**NO_CLIP, **LEADING, "variance_type": "fixed_large"}, 10, {}),
        ({**NO_CLIP, "variance_type": "fixed_large"}, 10, {}),
        ({**NO_CLIP, "variance_type": "fixed_small_log"}, 10, {}),
        ({"variance_type": "learned_range", **LEADING}, 10, {}),
        ({"variance_type": "learned_range", **NO_CLIP, **COSINE, **V}, 10, {}),
        ({**NO_CLIP, "beta_schedule": "sigmoid", **V}, 9, {}),
        ({**NO_CLIP, "beta_schedule": "laplace", **X0}, 9, {}),
        ({"clip_sample_range": 2.5}, 10, {}),
        ({**THRESHOLD}, 10, {}),
        ({**LOW_THRESHOLD}, 10, {}),
        ({**ZERO_SNR, **NO_CLIP, **TRAILING}, 10, {}),
        ({**SHORT, **NO_CLIP, **V}, 10, {}),
        ({**TRAINED, **NO_CLIP, **V}, 20, {}),
        ({**NO_CLIP, **V}, None, {"timesteps": [900, 777, 400, 33, 2]}),
        ({**NO_CLIP, **V}, 10, {"strength": 0.65}),
    ],
    "DDIMScheduler": [
        ({}, 10, {}),
        ({**NO_CLIP}, 7, {}),
        ({**NO_CLIP, **LINSPACE, **V}, 7, {}),
        ({**NO_CLIP, **TRAILING, **X0}, 13, {}),
        ({**NO_CLIP, **TRAILING, **V}, 30, {}),
        ({**NO_CLIP, **LEADING, "set_alpha_to_one": False, **SD}, 10, {}),
        ({**NO_CLIP, **LEADING, **SD}, 10, {"eta": 0.5}),
        ({**LEADING, **SD}, 10, {"eta": 1.0}),
        ({}, 10, {"use_clipped_model_output": True, "eta": 0.3}),
        ({"clip_sample_range": 2.5, **V}, 10, {}),
        ({**THRESHOLD, **X0}, 10, {}),
        ({**LOW_THRESHOLD}, 10, {"eta": 0.7}),
        ({**ZERO_SNR, **NO_CLIP, **TRAILING}, 10, {}),
        ({**ZERO_SNR, **TRAILING}, 10, {"eta": 0.9}),
        ({**COSINE, **NO_CLIP, **V}, 10, {}),
        ({**SHORT, **NO_CLIP, **V}, 9, {}),
        ({**TRAINED, **NO_CLIP, **V}, 6, {}),
        ({**NO_CLIP, **V}, 10, {"strength": 0.65}),
    ],
    "DDIMInverseScheduler": [
        ({}, 10, {}),
        ({**NO_CLIP}, 7, {}),
        ({**V}, 10, {}),
        ({**V, **NO_CLIP, **TRAILING}, 10, {}),
        ({"set_alpha_to_one": False, **X0, **SD, **LEADING}, 10, {}),
        ({"set_alpha_to_one": False, **X0, **NO_CLIP}, 10, {}),
        ({"set_alpha_to_zero": False, **NO_CLIP}, 10, {}),
        ({"clip_sample_range": 0.5, **TRAILING}, 7, {}),
        ({**TRAINED, **V}, 6, {}),
        ({**NO_CLIP, **ZERO_SNR}, 10, {}),
        ({**COSINE, **V}, 10, {}),
    ],
    "PNDMScheduler": [
        ({"skip_prk_steps": skip, **more}, steps, {})
        for skip in (True, False)
        for more, steps in (
            ({}, 10),
            ({**SD, **LEADING, "set_alpha_to_one": True}, 10),
            ({**V}, 7),
            ({**TRAILING}, 7),
            ({**LINSPACE, **V}, 10),
            ({**COSINE, **V}, 8),
            ({**SHORT}, 4),
        )
    ]
    + [
        ({"skip_prk_steps": True}, 1, {}),
        ({"skip_prk_steps": True}, 2, {}),
        ({"skip_prk_steps": True}, 3, {}),
        ({"skip_prk_steps": True}, 10, {"strength": 0.6}),
        ({"skip_prk_steps": False}, 10, {"strength": 0.6}),
        ({**TRAINED, "skip_prk_steps": True}, 10, {}),
    ],
    "LCMScheduler": [
        ({}, 4, {}),
        ({}, 1, {}),
        ({**V, "original_inference_steps": 40}, 8, {}),
        ({**X0, "timestep_scaling": 0.001}, 4, {}),
        ({"clip_sample": True, "clip_sample_range": 2.0}, 4, {}),
        ({**THRESHOLD}, 4, {}),
        ({**ZERO_SNR, "original_inference_steps": 30}, 4, {}),
        ({}, 4, {"strength": 0.6}),
        ({}, 4, {"original_inference_steps": 100}),
        ({}, None, {"timesteps": [979, 500, 99]}),
        ({"num_train_timesteps": 500, "beta_schedule": "linear", "beta_end": 0.02}, 4, {}),
        ({**TRAINED, **V, "original_inference_steps": 10, "beta_start": 0.1}, 4, {}),
        ({**LOW_THRESHOLD, **LINSPACE, "steps_offset": 1, "set_alpha_to_one": False}, 4, {}),
    ],
    "TCDScheduler": [
        ({}, 4, {}),
        ({}, 4, {"eta": 0.0}),
        ({}, 4, {"eta": 1.0}),
        ({**V}, 7, {"eta": 0.55}),
        ({**X0}, 3, {}),
        ({}, 1, {}),
        ({**ZERO_SNR}, 4, {}),
        ({}, 4, {"strength": 0.6}),
        ({"original_inference_steps": 20}, 4, {}),
        ({"num_train_timesteps": 500, "beta_schedule": "linear", "beta_end": 0.02}, 4, {}),
        ({**TRAINED, **V, "original_inference_steps": 10, "beta_start": 0.1}, 4, {}),
        ({**TRAILING, "steps_offset": 1, "set_alpha_to_one": False}, 4, {}),
        ({}, None, {"timesteps": [999, 500, 99]}),
    ],
    "EulerDiscreteScheduler": [
        ({}, 10, {}),
        ({**SD, **LEADING}, 7, {}),
        ({**SD, **TRAILING, **V}, 7, {}),
        ({**X0, "interpolation_type": "log_linear"}, 10, {}),
        ({"prediction_type": "original_sample"}, 10, {}),
        ({**SD, **KARRAS, **V}, 10, {}),
        ({**SD, **KARRAS, "sigma_min": 0.1, "sigma_max": 10.0}, 10, {}),
        ({**SD, **EXPONENTIAL, **LEADING}, 10, {}),
        ({**SD, **BETA}, 10, {}),
        ({**SD, **KARRAS, "interpolation_type": "log_linear"}, 10, {}),
        (
            {**SD, "interpolation_type": "log_linear", "timestep_type": "continuous", **V},
            9,
            {},
        ),
        ({**SD, **LEADING, **SIGMA_MIN}, 10, {}),
        ({**SD, **SIGMA_MIN}, 10, {}),
        ({**SD, **TRAILING, **ZERO_SNR}, 10, {}),
        ({**SD, "timestep_type": "continuous", **V}, 10, {}),
        ({**SD, "timestep_type": "continuous"}, 10, {}),
        ({**COSINE, **V, **LEADING}, 10, {}),
        ({**SHORT, **V}, 10, {}),
        ({**TRAINED, **V}, 10, {}),
        ({**SD}, None, {"timesteps": [999, 800.5, 500, 100, 3]}),
        ({**SD}, None, {"sigmas": [14.0, 5.0, 2.0, 0.5, 0.1, 0.0]}),
        ({**SD, **V}, None, {"sigmas": [14.0, 5.0, 2.0, 0.5, 0.1]}),
        ({**SD, **LEADING}, 10, {"strength": 0.65}),
    ],
    "EulerAncestralDiscreteScheduler": [
        ({}, 10, {}),
        ({**SD, **LEADING}, 7, {}),
        ({**SD, **TRAILING, **V}, 7, {}),
        ({**SD, **TRAILING, **ZERO_SNR}, 10, {}),
        ({**COSINE, **V}, 10, {}),
        ({**TRAINED, **V}, 10, {}),
        ({**SD}, 10, {"strength": 0.65}),
    ],
    "LMSDiscreteScheduler": [
        ({}, 10, {}),
        ({**SD, **LEADING}, 7, {}),
        ({**SD, **TRAILING, **V}, 7, {}),
        ({**X0, **KARRAS}, 10, {}),
        ({**SD, **EXPONENTIAL, **V}, 10, {}),
        ({**SD, **BETA, **V}, 10, {}),
        ({**TRAINED, **V}, 10, {}),
    ],
    "HeunDiscreteScheduler": [
        ({}, 10, {}),
        ({**SD, **LEADING}, 7, {}),
        ({**SD, **TRAILING, **V}, 7, {}),
        ({**X0, **KARRAS}, 10, {}),
        ({**EXPONENTIAL, **V}, 10, {}),
        ({**BETA, **V}, 10, {}),
        ({**NO_CLIP, "beta_schedule": "exp", **V, **LEADING}, 10, {}),
        ({**COSINE, **V}, 10, {"double": True}),
        ({"clip_sample": True, "clip_sample_range": 1.5}, 10, {}),
        ({"beta_start": 0.0001, "beta_end": 0.02, **V}, 10, {}),
        ({**TRAINED, **V}, 10, {}),
        ({}, None, {"timesteps": [999, 800, 500, 100, 3]}),
        ({**SD, **LEADING}, 10, {"strength": 0.65}),
    ],
    **{
        name: [
            ({}, 10, {}),
            ({**SD, **LEADING}, 7, {}),
            ({**SD, **TRAILING, **V}, 7, {}),
            ({**KARRAS}, 10, {}),
            ({**EXPONENTIAL, **V}, 10, {}),
            ({**BETA, **V}, 10, {}),
            ({**COSINE, **V, **LEADING}, 10, {}),
            ({**TRAINED, **V}, 10, {}),
            ({"beta_start": 0.0001, "beta_end": 0.02, **V}, 4, {}),
            ({**SD, **LEADING}, 10, {"strength": 0.65}),
        ]
        for name in ("KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler")
    },
    "DPMSolverMultistepScheduler": [
        *(({**SD, **order(k)}, n, {}) for k in (1, 2, 3) for n in (1, 2, 3, 7, 20)),
        *(({**SD, **order(k), **HEUN, **V}, 10, {}) for k in (2, 3)),
        *(({**NOISE, **SD, **order(k), **V}, n, {}) for k in (1, 2, 3) for n in (7, 20)),
        ({**NOISE, **HEUN}, 10, {}),
        ({**NOISE, **X0}, 10, {}),
        ({**NOISE, **THRESHOLD}, 10, {}),
        ({**SDE, **SD}, 10, {}),
        ({**SDE, **SD, **HEUN, **KARRAS}, 20, {}),
        ({**SDE, **order(1), **V}, 10, {}),
        ({**SDE_NOISE, **SD}, 10, {}),
        ({**SDE_NOISE, **SD, **HEUN, **V}, 20, {}),
        ({"algorithm_type": "deis", "solver_type": "logrho", **SD, **SIGMA_MIN}, 10, {}),
        ({**SD, "lower_order_final": False, **order(3)}, 10, {}),
        ({**SD, "lower_order_final": False, **SIGMA_MIN}, 10, {}),
        ({**SD, "euler_at_final": True, **SIGMA_MIN}, 20, {}),
        ({**SD, **SIGMA_MIN, **order(3)}, 20, {}),
        ({**SD, **KARRAS}, 10, {}),
        ({**SD, **KARRAS}, 50, {}),
        ({**SD, **KARRAS, **SIGMA_MIN}, 20, {}),
        ({**COSINE, **KARRAS, **V}, 10, {}),
        ({**SD, **EXPONENTIAL}, 10, {}),
        ({**SD, **BETA}, 10, {}),
        ({**SD, **LU}, 10, {}),
        ({**COSINE, **LU, **V}, 10, {}),
        ({**COSINE, **V, "lambda_min_clipped": -5.1}, 10, {}),
        ({**COSINE, **V, "lambda_min_clipped": -5.1, **TRAILING}, 10, {}),
        ({**SD, **LEADING, **X0}, 10, {}),
        ({**SD, **TRAILING, **THRESHOLD}, 7, {}),
        ({**LOW_THRESHOLD, **LEADING}, 10, {}),
        ({**SD, **TRAILING, **ZERO_SNR}, 10, {}),
        ({**FLOW}, 10, {}),
        ({**FLOW, **order(3), **SDE, **order(2)}, 20, {}),
        ({**FLOW, "prediction_type": "epsilon"}, 10, {}),
        ({**FLOW, **DYNAMIC}, 10, {"mu": 0.8}),
        ({**SD, "variance_type": "fixed_small"}, 10, {}),
        ({**SHORT, **V}, 10, {}),
        ({**TRAINED, **V}, 6, {}),
        ({**SD}, None, {"timesteps": [999, 800, 500, 100, 3]}),
        ({**SD, **order(3)}, 20, {"strength": 0.65}),
        ({**SDE, **SD}, 10, {"strength": 0.65}),
    ],
    "DPMSolverMultistepInverseScheduler": [
        *(({**SD, **order(k)}, n, {}) for k in (1, 2, 3) for n in (3, 7, 20)),
        ({**SD, "algorithm_type": "dpmsolver", **V}, 10, {}),
        ({"algorithm_type": "dpmsolver", **SD, **HEUN, **X0}, 20, {}),
        ({**SD, **LEADING, **V}, 10, {}),
        ({**SD, **TRAILING, **V}, 7, {}),
        ({**SD, **KARRAS}, 10, {}),
        ({**SD, **KARRAS}, 30, {}),
        ({**SD, **EXPONENTIAL, **V}, 10, {}),
        ({**SD, **BETA, **V, "euler_at_final": True}, 10, {}),
        ({**SD, **LOW_THRESHOLD}, 10, {}),
        ({**SD, "lower_order_final": False, **order(3), "variance_type": "fixed_small"}, 10, {}),
        ({**TRAINED, **V}, 6, {}),
        ({**COSINE, **V, "lambda_min_clipped": -5.1}, 10, {}),
    ],
    "DPMSolverSinglestepScheduler": [
        *(({**SD, **order(k)}, n, {}) for k in (1, 2, 3) for n in (2, 7, 9, 10)),
        *(
            ({**SD, **SIGMA_MIN, **order(k), "lower_order_final": low}, n, {})
            for k in (2, 3)
            for n in (11, 12)
            for low in (True, False)
        ),
        *(
            ({**SD, **NOISE, **V, **order(k), **kind}, 12, {})
            for k in (2, 3)
            for kind in ({}, HEUN)
        ),
        *(({**SD, **V, **order(k), **HEUN}, 12, {}) for k in (2, 3)),
        ({**SDE, **SD}, 9, {}),
        ({**SDE, **SD, **HEUN}, 10, {}),
        ({**SDE, **SD, **order(3)}, 10, {}),
        ({**SD, **KARRAS, **X0}, 10, {}),
        ({**SD, **EXPONENTIAL}, 10, {}),
        ({**SD, **BETA}, 10, {}),
        ({**SD, **LOW_THRESHOLD, "variance_type": "fixed_small"}, 10, {}),
        ({**COSINE, **V, "lambda_min_clipped": -5.1}, 10, {}),
        ({**FLOW}, 10, {}),
        ({**FLOW, **DYNAMIC}, 10, {"mu": 0.8}),
        ({**TRAINED, **V}, 6, {}),
        ({**SD}, None, {"timesteps": [999, 800, 500, 100, 3]}),
        ({**SD, **order(3)}, 11, {"strength": 0.65}),
    ],
    "UniPCMultistepScheduler": [
        *(({**SD, **order(k)}, n, {}) for k in (1, 2, 3, 4) for n in (1, 2, 5, 10)),
        *(({**SD, **SIGMA_MIN, **order(k), "solver_type": "bh1"}, 10, {}) for k in (1, 2, 3)),
        *(({**SD, **SIGMA_MIN, **order(k), "predict_x0": False, **V}, 10, {}) for k in (1, 2, 3)),
        ({**SD, **SIGMA_MIN, "lower_order_final": False}, 10, {}),
        ({**SD, **SIGMA_MIN, "lower_order_final": False, **order(3)}, 10, {}),
        ({**SD, "disable_corrector": [0, 3]}, 10, {}),
        ({**SD, **KARRAS}, 10, {}),
        ({**SD, **KARRAS, **SIGMA_MIN}, 10, {}),
        ({**SD, **KARRAS, **SIGMA_MIN, "lower_order_final": False}, 10, {}),
        ({**SD, **KARRAS, "sigma_min": 0.1, "sigma_max": 10.0}, 10, {}),
        ({**SD, **EXPONENTIAL, **V}, 10, {}),
        ({**SD, **BETA, **X0}, 10, {}),
        ({**SD, **LEADING}, 10, {}),
        ({**SD, **TRAILING}, 7, {}),
        ({**SD, **LOW_THRESHOLD}, 10, {}),
        ({**SD, **TRAILING, **ZERO_SNR}, 10, {}),
        ({**FLOW}, 10, {}),
        ({**FLOW, **KARRAS}, 10, {}),
        ({**FLOW, **SIGMA_MIN}, 10, {}),
        ({**FLOW, **DYNAMIC}, 10, {"mu": 0.8}),
        ({**FLOW, **DYNAMIC, "time_shift_type": "linear"}, 10, {"mu": 1.8}),
        ({**FLOW, "shift_terminal": 0.1}, 10, {}),
        ({**FLOW}, None, {"sigmas": [0.98, 0.8, 0.5, 0.2]}),
        ({**COSINE, **V}, 10, {}),
        ({**TRAINED, **V}, 6, {}),
        ({**SD, **order(3), "disable_corrector": [4]}, 10, {"strength": 0.65}),
    ],
    "DEISMultistepScheduler": [
        *(({**SD, **order(k)}, n, {}) for k in (1, 2, 3) for n in (1, 2, 5, 10, 20)),
        ({**SD, "lower_order_final": False, **order(3)}, 10, {}),
        ({**SD, "algorithm_type": "dpmsolver++", "solver_type": "heun"}, 10, {}),
        ({**SD, **KARRAS, **V}, 10, {}),
        ({**SD, **EXPONENTIAL, **X0}, 20, {}),
        ({**SD, **BETA}, 10, {}),
        ({**SD, **LEADING}, 10, {}),
        ({**SD, **TRAILING}, 7, {}),
        ({**SD, **LOW_THRESHOLD}, 10, {}),
        ({**FLOW}, 10, {}),
        ({**FLOW, **DYNAMIC}, 10, {"mu": 0.8}),
        ({**COSINE, **V}, 10, {"double": True}),
        ({**TRAINED, **V}, 6, {}),
        ({**SD, **order(3)}, 20, {"strength": 0.65}),
    ],
    "SASolverScheduler": [
        ({**SD}, 10, {}),
        *(
            ({**SD, "predictor_order": p, "corrector_order": c}, 10, {})
            for p, c in ((1, 1), (1, 2), (2, 1), (2, 3), (3, 2), (3, 3), (3, 4))
        ),
        ({**SD, "lower_order_final": False}, 10, {}),
        ({**SD, "algorithm_type": "noise_prediction"}, 10, {}),
        ({**SD, "algorithm_type": "noise_prediction", "predictor_order": 3, **V}, 10, {}),
        ({**SD, **KARRAS}, 10, {}),
        ({**SD, **EXPONENTIAL, **V}, 10, {}),
        ({**SD, **BETA, **X0}, 10, {}),
        ({**SD, **LEADING}, 10, {}),
        ({**SD, **TRAILING}, 7, {}),
        ({**SD, **LOW_THRESHOLD, "variance_type": "fixed_small"}, 10, {}),
        ({**TRAINED, **V}, 6, {}),
        ({**FLOW}, 10, {}),
        ({**COSINE, **V, "lambda_min_clipped": -5.1}, 10, {}),
        ({**SD}, 10, {"strength": 0.65}),
    ],
    "FlowMatchEulerDiscreteScheduler": [
        ({}, 10, {}),
        ({"shift": 3.0}, 7, {}),
        ({"shift": 3.0, **KARRAS}, 10, {}),
        ({"shift": 3.0, **EXPONENTIAL}, 10, {}),
        ({"shift": 3.0, **BETA}, 10, {}),
        ({"shift": 3.0, "shift_terminal": 0.1}, 10, {}),
        ({"shift": 3.0, "stochastic_sampling": True}, 10, {}),
        ({"shift": 3.0, "invert_sigmas": True}, 10, {}),
        ({**DYNAMIC}, 10, {"mu": 0.9}),
        ({**DYNAMIC, "time_shift_type": "linear"}, 10, {"mu": 1.9}),
        ({"num_train_timesteps": 500}, 10, {}),
        ({"shift": 3.0}, None, {"sigmas": [1.0, 0.7, 0.3, 0.1]}),
        ({"shift": 3.0}, 4, {"sigmas": [1.0, 0.7, 0.3, 0.1]}),
        ({"shift": 3.0}, None, {"timesteps": [1000, 700, 300, 100]}),
        ({}, None, {"timesteps": [999, 750, 500], "sigmas": [1.0, 0.7, 0.3]}),
        ({"shift": 3.0}, 10, {"strength": 0.75}),
    ],
    "FlowMatchHeunDiscreteScheduler": [
        ({}, 10, {}),
        ({"shift": 3.0}, 7, {}),
        ({"num_train_timesteps": 500}, 1, {}),
    ],
    "EDMEulerScheduler": [
        ({}, 10, {}),
        ({"sigma_data": 1.0, **V, "rho": 5.0, "sigma_min": 0.01, "sigma_max": 50.0}, 7, {}),
        ({"sigma_schedule": "exponential", **SHORT}, 10, {}),
        ({**SIGMA_MIN}, 10, {}),
    ],
    "EDMDPMSolverMultistepScheduler": [
        *((order(k), n, {}) for k in (1, 2, 3) for n in (3, 10, 20)),
        ({**HEUN, **V}, 10, {}),
        ({**SDE}, 10, {}),
        ({**SDE, **HEUN}, 20, {}),
        ({**SIGMA_MIN}, 10, {}),
        ({**SIGMA_MIN, "euler_at_final": True}, 20, {}),
        ({"lower_order_final": False, **order(3)}, 10, {}),
        ({"sigma_schedule": "exponential", "sigma_data": 1.0}, 10, {}),
        ({**LOW_THRESHOLD}, 10, {}),
        ({"sigma_min": 0.01, "sigma_max": 50.0, "rho": 5.0, **SHORT}, 10, {}),
        ({"algorithm_type": "deis", **SIGMA_MIN}, 10, {}),
    ],
    "CMStochasticIterativeScheduler": [
        ({}, 4, {}),
        ({}, 1, {}),
        ({}, 40, {}),
        ({"clip_denoised": False, "sigma_max": 50.0}, 7, {}),
        ({"s_noise": 0.9, "rho": 5.0, "sigma_data": 1.0, "sigma_min": 0.01}, 4, {}),
        ({"num_train_timesteps": 151}, None, {"timesteps": [150, 106, 22, 0]}),
    ],
}

# Fields that no case varies, and why.
NULL = {"solver_p", "tau_func"}  # only null can stand in a file
IN_MU = {"base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len"}  # see dynamic_mu
IN_LINEAR_MU = {"time_shift_type"}  # mu with "linear" is an assertion in diffusers
REFUSED = {"use_flow_sigmas", "flow_shift"}
CLIPPING = {"clip_sample", "clip_sample_range", *THRESHOLD, "dynamic_thresholding_ratio"}
EXCEPTIONS = {
    "DPMSolverMultistepScheduler": IN_LINEAR_MU,
    "DPMSolverMultistepInverseScheduler": REFUSED,
    "DPMSolverSinglestepScheduler": IN_LINEAR_MU,
    "UniPCMultistepScheduler": NULL,
    "DEISMultistepScheduler": IN_LINEAR_MU,
    "SASolverScheduler": NULL,
    "TCDScheduler": {*CLIPPING, "timestep_scaling"},  # diffusers reads none of them
    "FlowMatchEulerDiscreteScheduler": IN_MU,
}
