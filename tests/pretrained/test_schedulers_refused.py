"""What of a scheduler's config and arguments is refused, and by which name."""

import pytest

from diffusion.pretrained.schedulers import from_diffusers

EULER, DPM = "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"
SINGLE, UNIPC = "DPMSolverSinglestepScheduler", "UniPCMultistepScheduler"
FLOW, INVERSE = "FlowMatchEulerDiscreteScheduler", "DPMSolverMultistepInverseScheduler"
SDE = {"algorithm_type": "sde-dpmsolver++", "solver_order": 3}
EDM_DPM = "EDMDPMSolverMultistepScheduler"
COSINE = {"beta_schedule": "squaredcos_cap_v2"}
FEW, ANY = {"steps": 10}, {"steps": 4}


@pytest.mark.parametrize(
    ("name", "fields", "arguments", "message"),
    [
        # Names
        ("EulerDiscreteSheduler", {}, FEW, "_class_name: .*nearest: EulerDiscreteScheduler"),
        ("ScoreSdeVeScheduler", {}, FEW, "_class_name"),
        (None, {}, FEW, "_class_name"),
        (EULER, {"beta_strat": 0.1}, FEW, "beta_strat: .*'beta_start'"),
        (EULER, {"flux_capacitor": 1}, FEW, "flux_capacitor"),
        (EULER, {"clip_sample": True, "thresholding": True}, FEW, "thresholding: .*ignore"),
        (SINGLE, {"use_lu_lambdas": True}, FEW, "use_lu_lambdas: .*ignore"),
        (SINGLE, {"timestep_spacing": "trailing"}, FEW, "timestep_spacing: .*ignore"),
        (INVERSE, {"final_sigmas_type": "sigma_min"}, FEW, "final_sigmas_type: .*ignore"),
        ("DDIMInverseScheduler", {"thresholding": True}, FEW, "thresholding: .*ignore"),
        # Values
        (EULER, {"beta_schedule": "sigmoid"}, FEW, "beta_schedule: .*squaredcos_cap_v2.*'sigmoid'"),
        (EULER, {"beta_schedule": "exp"}, FEW, "beta_schedule"),
        (EULER, {"rescale_betas_zero_snr": True}, FEW, "rescale_betas_zero_snr: .*below 2\\^-24"),
        (EULER, {"prediction_type": "v"}, FEW, "prediction_type: .*v_prediction.*'v'"),
        (EULER, {"timestep_spacing": "even"}, FEW, "timestep_spacing"),
        (EULER, {"interpolation_type": "cubic"}, FEW, "interpolation_type"),
        (EULER, {"timestep_type": "cubic"}, FEW, "timestep_type"),
        (EULER, {"final_sigmas_type": "one"}, FEW, "final_sigmas_type"),
        (EULER, {"trained_betas": [0.1, 0.2]}, FEW, "trained_betas must have num_train"),
        (EULER, {"use_karras_sigmas": True, "use_beta_sigmas": True}, FEW, "only one of"),
        ("EulerAncestralDiscreteScheduler", {"prediction_type": "sample"}, FEW, "prediction_type"),
        ("KDPM2DiscreteScheduler", {"prediction_type": "sample"}, FEW, "prediction_type"),
        ("PNDMScheduler", {"prediction_type": "sample"}, FEW, "prediction_type"),
        ("PNDMScheduler", {}, {"steps": 3}, "skip_prk_steps"),
        ("DDIMInverseScheduler", {"timestep_spacing": "linspace"}, FEW, "timestep_spacing"),
        ("DDIMInverseScheduler", {"prediction_type": "sample"}, FEW, "prediction_type"),
        ("DDPMScheduler", {"variance_type": "learned"}, FEW, "variance_type: .*learned_range"),
        ("DDPMScheduler", {"variance_type": "fixed_large_log"}, FEW, "variance_type"),
        ("TCDScheduler", {"clip_sample": True}, ANY, "clip_sample"),
        ("TCDScheduler", {"thresholding": True}, ANY, "thresholding"),
        *(
            (
                name,
                {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
                ANY,
                "prediction",
            )
            for name in ("DDPMScheduler", "DDIMScheduler", "LCMScheduler", "TCDScheduler")
        ),
        # DPM-Solver
        (DPM, SDE, FEW, "solver_order: 3 .*wrong sign"),
        (SINGLE, {**SDE, "solver_type": "heun"}, FEW, "solver_order: 3 .*wrong sign"),
        (EDM_DPM, SDE, FEW, "solver_order: 3"),
        *(
            (
                EDM_DPM,
                {"final_sigmas_type": "sigma_min", **more},
                {"steps": 20},
                "final_sigmas_type",
            )
            for more in ({"solver_type": "heun"}, {"algorithm_type": "sde-dpmsolver++"})
        ),
        (DPM, {"solver_order": 4}, FEW, "solver_order: .*1, 2, 3, got 4"),
        (DPM, {"algorithm_type": "dpmsolver"}, FEW, "final_sigmas_type: 'zero'"),
        (DPM, {"algorithm_type": "unipc"}, FEW, "algorithm_type"),
        (SINGLE, {"algorithm_type": "sde-dpmsolver"}, FEW, "algorithm_type"),
        (INVERSE, {"algorithm_type": "sde-dpmsolver++"}, FEW, "algorithm_type"),
        (INVERSE, {"use_flow_sigmas": True}, FEW, "use_flow_sigmas"),
        (
            INVERSE,
            {"use_beta_sigmas": True, "solver_type": "heun"},
            {"steps": 20},
            "final_sigmas_type",
        ),
        (
            DPM,
            {"use_karras_sigmas": True, "solver_order": 3, "final_sigmas_type": "sigma_min"},
            {"steps": 20},
            "final_sigmas_type: .*divides by zero",
        ),
        (DPM, {"solver_type": "euler"}, FEW, "solver_type"),
        (DPM, {"prediction_type": "flow_prediction"}, FEW, "use_flow_sigmas=True"),
        (DPM, {"prediction_type": "v_prediction", "use_flow_sigmas": True}, FEW, "v_prediction"),
        (DPM, {"use_flow_sigmas": True, "use_karras_sigmas": True}, FEW, "use_flow_sigmas"),
        (
            SINGLE,
            {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min", "thresholding": True},
            FEW,
            "thresholding",
        ),
        (DPM, {}, {"steps": 10, "mu": 1.0}, "mu: needs use_dynamic_shifting"),
        (DPM, {"use_karras_sigmas": True}, {"timesteps": [900, 1]}, "timesteps: not with"),
        # The other multistep classes
        (UNIPC, {"solver_type": "bh1"}, FEW, "solver_type: 'bh1' is NaN"),
        (UNIPC, {"predict_x0": False}, FEW, "predict_x0: False is NaN"),
        (UNIPC, {"lower_order_final": False}, FEW, "lower_order_final: False is NaN"),
        (UNIPC, {"solver_p": {"a": 1}}, FEW, "solver_p"),
        (
            UNIPC,
            {**COSINE, "predict_x0": False, "final_sigmas_type": "sigma_min"},
            FEW,
            "predict_x0: False is not supported from sigma = 2.* > 1000",
        ),
        (
            "SASolverScheduler",
            {**COSINE, "algorithm_type": "noise_prediction"},
            FEW,
            "algorithm_type: 'noise_prediction' is not supported from sigma",
        ),
        (UNIPC, {"solver_order": 5}, FEW, "solver_order"),
        (UNIPC, {"shift_terminal": 0.1}, FEW, "shift_terminal"),
        (UNIPC, {"use_dynamic_shifting": True}, FEW, "use_dynamic_shifting: True needs mu"),
        (UNIPC, {}, {"sigmas": [0.9, 0.1]}, "sigmas"),
        (UNIPC, {"use_flow_sigmas": True, "use_beta_sigmas": True}, FEW, "use_flow_sigmas"),
        (
            UNIPC,
            {"predict_x0": False, "final_sigmas_type": "sigma_min", "thresholding": True},
            FEW,
            "thresholding",
        ),
        ("SASolverScheduler", {"tau_func": "t"}, FEW, "tau_func"),
        ("SASolverScheduler", {"predictor_order": 5}, FEW, "predictor_order"),
        (
            "SASolverScheduler",
            {"algorithm_type": "noise_prediction", "thresholding": True},
            FEW,
            "thresholding",
        ),
        ("DEISMultistepScheduler", {"solver_type": "bh3"}, FEW, "solver_type"),
        # Flows
        (FLOW, {"use_dynamic_shifting": True}, FEW, "use_dynamic_shifting: True needs mu"),
        (FLOW, {"stochastic_sampling": True, "invert_sigmas": True}, FEW, "stochastic_sampling"),
        (FLOW, {"time_shift_type": "cubic"}, FEW, "time_shift_type"),
        (FLOW, {}, {"steps": 3, "sigmas": [1.0, 0.5]}, "must have 3 entries, got 2"),
        # Arguments
        (EULER, {}, {}, "expected one of steps, timesteps and sigmas"),
        (EULER, {}, {"steps": 3, "timesteps": [3, 2, 1]}, "expected one of"),
        (EULER, {}, {"steps": 0}, "steps must be a whole number"),
        (EULER, {}, {"steps": 2.5}, "steps must be a whole number"),
        (EULER, {}, {"steps": 4, "eta": 0.5}, "eta: EulerDiscreteScheduler takes steps"),
        (EULER, {}, {"steps": 4, "strength": 0.0}, "strength must lie in"),
        (EULER, {}, {"steps": 4, "strength": 0.1}, "strength: 0.1 leaves none"),
        (EULER, {"use_karras_sigmas": True}, {"timesteps": [900, 1]}, "timesteps: not with"),
        (EULER, {}, {"sigmas": [1.0, 2.0, 0.5, 0.0]}, "sigma must change"),
        ("LMSDiscreteScheduler", {}, {"steps": 4, "strength": 0.5}, "strength"),
        ("LCMScheduler", {}, {"timesteps": [999, 500], "strength": 0.5}, "strength"),
        ("LCMScheduler", {}, {"steps": 60}, "steps: 60 is more than the 50"),
        ("LCMScheduler", {"original_inference_steps": 2000}, ANY, "original_inference_steps"),
        ("DDIMScheduler", {}, {"steps": 2000}, "steps: 2000 is more than"),
        ("DDIMScheduler", {"steps_offset": 2}, {"steps": 1000}, "steps_offset"),
        ("DDIMScheduler", {}, {"steps": 4, "eta": 1.5}, "eta must lie"),
        ("DDPMScheduler", {}, {"timesteps": [1, 5]}, "timesteps must descend"),
        ("DDPMScheduler", {}, {"timesteps": [1000, 5]}, "timesteps 1000..5 leave"),
        ("CMStochasticIterativeScheduler", {}, {"steps": 41}, "steps: 41"),
        (DPM, {}, {"steps": 1500}, "steps: sigma must change"),
    ],
)
def test_refused(name, fields, arguments, message):
    config = {**fields} if name is None else {"_class_name": name, **fields}
    with pytest.raises(ValueError, match=message):
        from_diffusers(config, **arguments)
