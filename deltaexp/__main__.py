"""The command line: ``python -m deltaexp [command] [key=value ...]``; no command means ``run``.

Everything up to the start of a run works without torch, so that help and the errors in a config come at once.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from typing import Any

from deltaexp import __version__, commands
from deltaexp.errors import ConfigError, DeltaExpError, InterruptedRunError, unknown
from deltaexp.lab import processes
from deltaexp.lazy import imports
from deltaexp.redaction import guard_logs, redact

RUN = {
    "[run] [key=value ...]": "train, evaluate, verify and save a delta",
    "-m key=a,b [key=value ...]": "sweep: one run for every combination",
    "--cfg job [key=value ...]": "show the composed config, with -m the jobs of a sweep, and run nothing",
    "--help [delta_type=...]": "this text, with the keys of that delta type",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 1 for a failed run, 2 for a mistake in what was typed."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        command = words.pop(0) if words and "=" not in words[0] and words[0][:1] not in ("-", "+", "~") else "run"
        asks = {"--help", "-h", "--version"} & set(words)
        if asks and not processes.is_main():
            return 0
        known = ["run", *commands.names()]
        if command not in known:
            raise ConfigError(unknown("command", command, known) + " An override looks like key=value.")
        if any(word in ("--help", "-h") for word in words):
            print(_help(words) if command == "run" else _command_help(command))
            return 0
        if "--version" in words:
            print(f"deltaexp {__version__}")
            return 0
        if processes.count() > 1 and command != "run":
            raise ConfigError(f"`deltaexp {command}` works in one process. Start it without torchrun or accelerate launch.")
        return _run(words) if command == "run" else commands.load(command).main(words)
    except ConfigError as error:
        return _tell(redact(str(error)), 2)
    except DeltaExpError as error:
        return _tell(redact(str(error)), 1)
    except KeyboardInterrupt as error:
        # A run says how to continue it.
        return _tell(redact(str(error)) or "stopped by the keyboard.", 130)
    except Exception:
        if processes.speaks():
            raise
        return 1


def _tell(text: str, code: int) -> int:
    """Print an error, in one of the processes only where there are several, and return the exit code."""
    if processes.speaks():
        print(f"deltaexp: {text}", file=sys.stderr, flush=True)
    return code


def _run(words: list[str]) -> int:
    """Check what was typed, then let Hydra compose it again and call the run, once or for every job of a sweep."""
    import hydra
    from hydra.main import get_args_parser
    from omegaconf import DictConfig, OmegaConf

    from deltaexp.lab import recovery, schema
    from deltaexp.lab.sweeping import grid, sweep

    options = get_args_parser().parse_args(words)
    search_path = commands.search_path(options.config_dir)
    if not OmegaConf.has_resolver("short_id"):
        OmegaConf.register_new_resolver("short_id", lambda: os.urandom(3).hex(), use_cache=True)
    if not (options.hydra_help or options.info or options.shell_completion):
        if options.multirun and processes.count() > 1:
            raise ConfigError(
                "A sweep (-m) starts its jobs itself, one after the other in one process. Launch each job on its own with "
                "torchrun, or the sweep without it."
            )
        if options.multirun:
            told = grid.words_for_hydra(options.overrides)
            plan = grid.plan(tuple(told), tuple(search_path))
            if options.cfg:
                print(grid.listed(plan))
                return 0
            words = [*(word for word in words if word not in options.overrides), *told]
        else:
            if any(override.is_sweep_override() for override in schema.parse(options.overrides)):
                raise ConfigError("Several values for one key are a sweep: add -m, e.g. deltaexp -m delta_type=lora,adapter.")
            composed = schema.composed(options.overrides, search_path)
            if not options.cfg:
                schema.check_single(options.overrides, composed[0], search_path)
                processes.check(composed[0].trainer.sharding)
            if not processes.is_main():
                return 0 if options.cfg else _follow(*composed)
            if composed[0].resume and not options.cfg:
                words = _resumed(words, options.overrides, composed, search_path)

    if not processes.is_main():
        return 0  # the first process shows what Hydra has to say

    def single(cfg: DictConfig) -> float | None:
        from hydra.core.hydra_config import HydraConfig

        run_config, delta_config = schema.split(cfg)
        hydra_config = HydraConfig.get()
        guard_logs()  # the handlers are Hydra's, made for this job
        folder = hydra_config.runtime.output_dir
        with imports():
            from deltaexp.lab.run import run  # torch and transformers are imported here, not earlier

        again = " ".join(["python -m deltaexp", shlex.join(_with(words, options.overrides, ["resume=true"]))])
        score = run(run_config, delta_config, folder, again=again).score
        processes.finish()
        return score

    schema.register_schemas(search_path)
    # Errors reach us as they are, instead of printed by Hydra with a hint at its own switches.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    previous, sys.argv = sys.argv, ["deltaexp", *schema.spelled_out(words)]
    try:
        task = sweep.task if options.multirun else single
        hydra.main(config_path=str(schema.config_dir()), config_name="config", version_base="1.3")(task)()
    except OSError as error:  # Hydra writes too, before a run begins
        fault = recovery.disk_fault(error)
        if fault is None:
            raise
        raise InterruptedRunError(f"The run could not begin: {fault}. Make room, or name another folder.") from error
    finally:
        sys.argv = previous
    return 0


def _follow(run_config: Any, delta_config: Any) -> int:
    """Be one of the other processes of a run, whose folder is the one that Hydra makes in the first."""
    with imports():
        from deltaexp.lab.run import run

    guard_logs()
    run(run_config, delta_config, "")
    processes.finish()
    return 0


def _resumed(words: list[str], overrides: list[str], composed: tuple[Any, Any], search_path: list[str]) -> list[str]:
    """Return the words of a command with the folder of the run that it is to continue, and say which that is."""
    from deltaexp.lab import recovery, schema

    if any(override.key_or_group == "hydra.run.dir" for override in schema.parse(overrides)):
        return words
    parent = schema.run_folder(overrides, search_path).parent
    folder, finished = recovery.find(parent, recovery.describe(*composed))
    if folder is None:
        print(f"There is no run of this config below {str(parent)!r} that could be continued: a new one begins.", flush=True)
        return words
    what = "is done already" if finished else "is continued"
    print(f"The run in {str(folder)!r} {what}.", flush=True)
    return _with(words, overrides, [f"hydra.run.dir={_quoted(str(folder))}"])


def _with(words: Sequence[str], overrides: Sequence[str], more: Sequence[str]) -> list[str]:
    """Return a command's words with overrides more, or others, where the command has its first: they must stand together."""
    keys = {override.split("=", 1)[0] for override in more}
    kept = [word for word in words if word.split("=", 1)[0] not in keys]
    place = next((number for number, word in enumerate(kept) if word in overrides), len(kept))
    return [*kept[:place], *more, *kept[place:]]


def _quoted(value: str) -> str:
    """Return a value as Hydra's grammar wants it, in quotes where it has to be."""
    plain = all(character.isalnum() or character in "/-_.:+%@" for character in value)
    escaped = value.replace("\\'", "\\\\'").replace("'", "\\'")
    return value if plain else f"'{escaped}'"


def _command_help(name: str) -> str:
    """Return the help text of one command."""
    module = commands.load(name)
    form, what = module.USAGE.split("    ", 1)
    _, _, rest = (module.__doc__ or "").partition("\n")
    return "\n".join([f"usage: deltaexp {form}", "", f"  {what.strip()}", *([rest.rstrip()] if rest.strip() else [])])


def _usage() -> str:
    """Return a line for each thing that the command line can do."""
    others = (commands.load(name).USAGE.split("    ", 1) for name in commands.names())
    table = {**RUN, **{form: what.strip() for form, what in others}}
    width = max(len(form) for form in table if len(form) < 40)
    lines: list[str] = []
    for form, what in table.items():
        start = f"{'usage:' if not lines else '':6} deltaexp {form:<{width}}"
        lines.append(f"{start}  {what}" if len(form) <= width else f"{start}\n{'':{width + 16}}  {what}")
    return "\n".join([*lines, "", "(`python -m deltaexp` is the same as `deltaexp`; `deltaexp COMMAND --help` says more.)", ""])


def _help(words: list[str]) -> str:
    """Return the help text: usage, every group with its choices, and the keys of a delta type."""
    import dataclasses

    from deltaexp import registry
    from deltaexp.lab import config as lab_config
    from deltaexp.lab import schema

    lines = [_usage()]
    for group in (*schema.GROUPS, *schema.HYDRA_GROUPS):
        lines.append(f"{group}=")
        found = schema.choices(group)
        width = max(map(len, found), default=0)
        lines += [f"    {name:<{width}}  {text}" for name, text in found.items()] or ["    (none)"]
    chosen = next((word.split("=", 1)[1] for word in words if word.startswith("delta_type=")), "lora")
    lines.append(f"\nkeys of delta_type={chosen} (default):")
    lines += [f"    {key}={value}" for key, value in schema.defaults_of(chosen).items() if key != "delta_type"]
    if chosen in registry.known():
        lines.append(f"    (recommended trainer.learning_rate: {registry.get(chosen).learning_rate:g})")
    lines.append("\nkeys of a run (default; a task may set another):")
    flat = {key: value for key, value in vars(lab_config.RunConfig()).items() if key not in lab_config.PARTS}
    lines += [f"    {key}={str(value).lower()}" for key, value in flat.items()]
    for name, section in lab_config.PARTS.items():
        for field in dataclasses.fields(type(section())):
            value = getattr(section(), field.name)
            lines.append(f"    {name}.{field.name}={'null' if value is None else value}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
