"""tpvc compiles an adapted language model to the hardware it will run on."""

from importlib import import_module

__version__ = "0.1.0"

_API = {
    "load": "tpvc.compiler.frontends",
    "plan": "tpvc.compiler.plan",
    "quantize": "tpvc.compiler.pipeline",
    "export": "tpvc.compiler.export_pipeline",
    "road_tune": "tpvc.compiler.tuning.road_tune",
    "road_merge": "tpvc.compiler.road_pipeline",
    "road_unmerge": "tpvc.compiler.road_pipeline",
    "road_compose": "tpvc.compiler.road_pipeline",
    "prompt_tune": "tpvc.compiler.tuning.prompt_tune",
    "prompt_vector": "tpvc.compiler.prompt_pipeline",
    "prompt_combine": "tpvc.compiler.prompt_pipeline",
    "prompt_negate": "tpvc.compiler.prompt_pipeline",
    "prompt_scale": "tpvc.compiler.prompt_pipeline",
    "prompt_similarity": "tpvc.compiler.prompt_pipeline",
    "prompt_embeds": "tpvc.compiler.prompt_embeds",
    "importance": "tpvc.compiler.finetune_pipeline",
    "finetune": "tpvc.compiler.finetune_pipeline",
    "generate": "tpvc.compiler.interpret",
    "perplexity": "tpvc.compiler.evaluate",
    "divergence": "tpvc.compiler.evaluate",
    "measure": "tpvc.compiler.measure",
    "evaluate_tasks": "tpvc.compiler.harness",
    "bench": "tpvc.compiler.bench",
    "verify": "tpvc.compiler.verification",
    "TpvcError": "tpvc.compiler.errors",
}
__all__ = ["__version__", *_API]


def __getattr__(name: str):
    """The public functions are imported when first used, so that `import tpvc` needs neither torch nor a GPU."""
    if name in _API:
        return getattr(import_module(_API[name]), name)
    raise AttributeError(f"module 'tpvc' has no attribute '{name}'")
