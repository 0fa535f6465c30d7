"""Options that several commands share. Nothing here imports JAX before a command runs."""

import dataclasses
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, TextIO

from gradot_jax.errors import InputError

if TYPE_CHECKING:
    from gradot_jax.cli.data import LoadedModel
    from gradot_jax.nn.batch import Batch
    from gradot_jax.parallel import DeviceMesh
    from gradot_jax.programs.program import Place, Program

Dtype = Literal["float32", "bfloat16", "float16"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Debuggable:
    """What every command takes.

    Attributes:
        debug: show the traceback of an error.
    """

    MEMORY: ClassVar[tuple[str, ...]] = ()
    """Fields that make a command need less memory."""

    debug: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class OnDevices(Debuggable):
    """What every command that computes takes.

    Attributes:
        dtype: of the arithmetic; factors, scores and masters are float32 in any case.
        mesh: devices along the batch and along the weights, as two numbers; all devices along
            the batch when left out.
        compile_cache: folder that keeps compiled programs for later runs, or `off`; by default
            $JAX_COMPILATION_CACHE_DIR or ~/.cache/gradot_jax/xla.
    """

    dtype: Dtype = "float32"
    mesh: tuple[int, int] | None = None
    compile_cache: str | None = None

    def device_mesh(self) -> "DeviceMesh | None":
        """The mesh asked for; None on a single device. The first use of JAX of a command."""
        import jax

        from gradot_jax.parallel import make_mesh, use_compile_cache

        self.check_mesh()
        use_compile_cache(self._cache_folder())
        if self.mesh is None:
            return make_mesh() if jax.device_count() > 1 else None
        data, model = self.mesh
        if jax.process_count() > 1 and data * model != jax.device_count():
            raise InputError(
                f"a mesh of data={data} x model={model} leaves out devices of a run of "
                f"{jax.process_count()} processes, which have {jax.device_count()}"
            )
        try:
            return make_mesh(data, model)
        except ValueError as error:
            raise InputError(f"--mesh: {error}") from None

    def check_mesh(self) -> None:
        """Raises InputError for numbers of devices that are none."""
        if self.mesh is not None and min(self.mesh) < 1:
            raise InputError(f"--mesh: both numbers must be at least 1, got {self.mesh}")

    def _cache_folder(self) -> Path | None:
        if self.compile_cache == "off":
            return None
        asked = self.compile_cache or os.environ.get("JAX_COMPILATION_CACHE_DIR")
        return Path(asked) if asked else Path.home() / ".cache" / "gradot_jax" / "xla"


@dataclasses.dataclass(frozen=True, kw_only=True)
class OnHosts(OnDevices):
    """What every command takes that runs as several processes, the same on each host.

    Attributes:
        distributed: join the other processes of the run; on TPU pods, Slurm and Open MPI they are
            found, elsewhere the next three say where they are. Process 0 alone writes.
        coordinator: `host:port` of process 0.
        num_processes: of the run.
        process_id: of this process, from 0.
        dry_run: run nothing; say the memory that the run takes, and of a compression what it would
            store.
        target: with --dry-run, chips that need not be here: a TPU slice such as v5e:2x4, or GPUs
            of one host such as h100x8. The run's programs are compiled for them, by their own
            compiler, and what each takes of a device is printed.
    """

    distributed: bool = False
    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    dry_run: bool = False
    target: str | None = None

    def place(self) -> "Place":
        """Where the run lies: on the target's devices, or on those that are here.

        The first use of JAX of a command, instead of `device_mesh`.
        """
        if self.target is None:
            import jax

            from gradot_jax.programs.program import Place

            mesh = self.device_mesh()
            return Place(jax.devices()[:1] if mesh is None else list(mesh.mesh.devices.flat), mesh)
        self._check_target()
        self.check_mesh()
        if self.distributed:
            raise InputError("--target goes without --distributed: one process compiles for all")
        from gradot_jax.programs.target import parse_target, prepare_environment

        target = parse_target(self.target)
        prepare_environment(target)
        from gradot_jax.cli.forecast import place_on

        return place_on(target, self.mesh)

    def _check_target(self) -> None:
        if self.target is not None and not self.dry_run:
            raise InputError("--target goes with --dry-run: programs are compiled, and none is run")

    def say_needs(self, place: "Place", programs: "list[Program]") -> None:
        """What the programs of a run take of each device, by the compiler of its place."""
        from gradot_jax.cli.forecast import say_whether_it_fits
        from gradot_jax.programs.target import parse_target

        target = None if self.target is None else parse_target(self.target)
        say_whether_it_fits(target, place, programs, self.MEMORY)

    def device_mesh(self) -> "DeviceMesh | None":
        """The mesh asked for, over the devices of all processes."""
        self._check_target()
        described = (self.coordinator, self.num_processes, self.process_id) != (None, None, None)
        if described and not self.distributed:
            raise InputError(
                "--coordinator, --num-processes and --process-id go with --distributed"
            )
        if self.distributed:
            from gradot_jax.parallel import initialize_distributed, is_writer

            initialize_distributed(self.coordinator, self.num_processes, self.process_id)
            if not is_writer():
                logging.getLogger("gradot_jax").setLevel(logging.ERROR)
        return super().device_mesh()


@dataclasses.dataclass(frozen=True, kw_only=True)
class OnModel(OnDevices):
    """What every command takes that runs a model, or the emulator of a bundle.

    Attributes:
        model: a checkpoint folder, or an id on the Hugging Face Hub.
        bundle: a bundle, instead of a model.
        adapter: a tuned adapter for the bundle.
        revision: branch, tag or commit on the Hub.
    """

    model: str | None = None
    bundle: Path | None = None
    adapter: Path | None = None
    revision: str | None = None

    def check_model(self) -> None:
        """Raises InputError where the options do not name one model."""
        if (self.model is None) == (self.bundle is None):
            raise InputError("give either --model or --bundle")
        if self.adapter is not None and self.bundle is None:
            raise InputError("--adapter goes with --bundle; plug-in puts it into a model")
        if self.revision is not None and self.bundle is not None:
            raise InputError("--revision goes with --model; a bundle is a local folder")

    def load(self, mesh: "DeviceMesh | None") -> "LoadedModel":
        """The model, or the emulator with its adapter or the tuned one.

        Of a checkpoint the tokenizer is read first, which costs little and may be missing; of a
        bundle nothing is parsed before all of it is verified.

        Raises:
            InputError: when what is named cannot be read.
        """
        from gradot_jax.cli.data import LoadedModel, open_tokenizer
        from gradot_jax.models.checkpoint import end_tokens, load_config, load_model
        from gradot_jax.models.partition import shard_params
        from gradot_jax.models.weight_files import checkpoint_folder
        from gradot_jax.offsite.adapter_file import load_adapter_for
        from gradot_jax.offsite.bundle import receive

        if self.bundle is None:
            folder = checkpoint_folder(str(self.model), self.revision)
            config = load_config(folder)
            tokenizer, ends = open_tokenizer(folder, config), end_tokens(folder, config)
            return LoadedModel(*load_model(folder, mesh=mesh, dtype=self.dtype), tokenizer, ends)
        found, tuned = receive(self.bundle, dtype=self.dtype, with_tokenizer=False), None
        config = found.config
        tokenizer, ends = open_tokenizer(self.bundle, config), end_tokens(self.bundle, config)
        if self.adapter is not None:
            tuned = load_adapter_for(self.adapter, found, dtype=self.dtype)
        params = found.emulator.assemble(tuned)
        params = params if mesh is None else shard_params(params, mesh)
        return LoadedModel(config, params, tokenizer, ends)


def say(*lines: str, to: TextIO | None = None) -> None:
    """Prints lines, in the process that writes; not before the processes have joined."""
    from gradot_jax.parallel import is_writer

    if is_writer():
        print(*lines, sep="\n", file=to)


def check_new(path: Path, *, overwrite: bool) -> None:
    """Refuses early what would be refused when the result is written."""
    if path.exists() and not path.is_dir():
        raise InputError(f"{path}: expected a folder, but there is a file of this name")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise InputError(f"{path}: the folder is not empty; --overwrite replaces it")


def check_comparison(path: Path) -> None:
    """Refuses a folder that is neither new nor a comparison to go on with."""
    new = not path.exists() or (path.is_dir() and not any(path.iterdir()))
    # A folder of something else would be mixed up with the cells.
    if not new and not (path / "cells").is_dir():
        raise InputError(f"{path}: exists and is no comparison to go on with")


def check_distinct(option: str, values: Sequence[object]) -> None:
    """Refuses a list that is empty or has anything twice."""
    if not values or len(set(values)) < len(values):
        raise InputError(f"{option}: expected some, each once, got {list(values)}")


def data_axis(mesh: "DeviceMesh | None") -> int:
    """Number of devices along the batch."""
    return 1 if mesh is None else mesh.mesh.shape["data"]


def fit_batch(examples: "Batch", batch_size: int, mesh: "DeviceMesh | None") -> int:
    """The largest batch of at most `batch_size` that the examples fill and the mesh divides.

    Raises:
        InputError: when there are fewer examples than devices along the batch.
    """
    devices = data_axis(mesh)
    fitting = min(batch_size, len(examples.input_ids)) // devices * devices
    if not fitting:
        raise InputError(
            f"{len(examples.input_ids)} examples in batches of {batch_size} cannot be spread over "
            f"{devices} devices"
        )
    return fitting
