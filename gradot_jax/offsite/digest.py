"""The digest by which the owner knows, at plug-in, which model and split an adapter is for."""

import hashlib
import json

import numpy as np

from gradot_jax.models.opt.config import OPTConfig
from gradot_jax.models.opt.names import shell_to_hf
from gradot_jax.models.opt.params import Params, Shell
from gradot_jax.offsite.names import adapter_to_tensors
from gradot_jax.offsite.split import Adapter, AdapterSpec, adapter_of


def base_digest(config: OPTConfig, params: Params, spec: AdapterSpec) -> str:
    """SHA-256 of what an emulator of this model and split ships unchanged.

    The middle does not enter: a digest of it would let anyone check a guess at it.

    Args:
        config: of the model.
        params: the full original model, in any dtype that holds it exactly.
        spec: the split.

    Returns:
        64 hexadecimal digits.
    """
    return shipped_digest(config, params.shell, adapter_of(params, spec))


def shipped_digest(config: OPTConfig, shell: Shell, adapter: Adapter) -> str:
    """The same digest from the original shell and outer blocks.

    It covers the split, and name, shape and float32 bytes of each tensor. Casting from float16
    and bfloat16 is exact, so the dtype that a model was loaded in does not matter.
    """
    spec = adapter.spec
    digest = hashlib.sha256(json.dumps([spec.num_bottom, spec.num_top, spec.inner]).encode())
    for tensors in (shell_to_hf(shell), adapter_to_tensors(config, adapter)):
        for name, array in tensors:
            digest.update(json.dumps([name, array.shape]).encode())
            digest.update(np.ascontiguousarray(array, dtype=np.float32))
    return digest.hexdigest()
