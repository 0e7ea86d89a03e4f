"""Four virtual CPU devices, and quick compilation; must run before JAX is imported."""

import os
from importlib.metadata import version

# An option that a version does not know ends the process.
EMITTERS = tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11)

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# XLA's CPU collectives deadlock when there are fewer threads than virtual devices need.
os.environ.setdefault("NPROC", "16")
# Tests compile much and run little: the optimiser would take most of their time.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=4",
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
        # Without the optimiser these emitters take longer to compile, and give slower code.
        *(["--xla_cpu_use_fusion_emitters=false"] if EMITTERS else []),
    ]
)
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def pytest_configure():
    """Tunes the process as main.py does, before a test module can use a device."""
    from diffusion import compiler

    compiler.tune()


LONG = (  # whole commands, whole pipelines, whole runs; those with the longest tests first
    *("test_notebooks.py", "test_main.py", "test_effects.py", "test_fields.py", "test_runs.py"),
    *("test_pretrained_modes.py", "test_tasks.py", "test_generate.py", "test_loading.py"),
    *("test_kill.py", "test_autoencoder_runs.py", "test_finetuning.py", "test_processes.py"),
    *("test_text_to_image.py", "test_compilation.py", "test_hand_over.py", "test_pictures.py"),
    *("test_taef2_network.py", "test_encoder_networks.py", "test_i3d_network.py"),
    *("test_vggish_network.py", "test_clips_and_sounds.py", "test_compare_mode.py"),
    *("test_adapter_runs.py", "test_ip_adapter_runs.py", "test_subjects_and_edits.py"),
    *("test_control_specs.py", "test_control.py", "test_image_prompts.py", "test_adapters.py"),
    *("test_instruct_pipelines.py", "test_adapter_export.py", "test_control_nets.py"),
    *("test_stacked_adapters.py", "test_few_step_runs.py", "test_every_trainer.py"),
    *("test_few_step_families.py", "test_few_step_commands.py"),
    *("test_judging.py", "test_torch_fidelity.py", "test_concepts.py"),
    *("test_inception_parity.py", "test_resize_parity.py"),
)


def pytest_collection_modifyitems(items):
    """Marks long tests, and puts them in order: none is left alone with a process at the end."""
    for item in items:
        if item.path.name in LONG:
            item.add_marker("long")
    places = {name: i for i, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONG)))
