"""Mutation testing by Cosmic Ray (https://cosmic-ray.readthedocs.io): `make mutate`. Results: docs/testing.md.

A seeded sample of mutants is tested in a clone of the last commit, build/mutation/tree, each by the quick tests of its
module. It can be interrupted and continued. After another commit, the mutants that survived and those of changed
modules are tested again.
"""

from __future__ import annotations

import argparse
import ast
import collections
import contextlib
import difflib
import functools
import hashlib
import importlib
import itertools
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
import tomllib

import pytest
from cosmic_ray.commands import init
from cosmic_ray.mutating import mutate_code, use_mutation
from cosmic_ray.plugins import get_operator
from cosmic_ray.work_db import WorkDB, use_db
from cosmic_ray.work_item import MutationSpec, TestOutcome, WorkerOutcome, WorkItem, WorkResult

ROOT = pathlib.Path(__file__).resolve().parent.parent
DIRECTORY = ROOT / "build/mutation"
TREE, SESSION = DIRECTORY / "tree", DIRECTORY / "session.sqlite"
COMMIT = DIRECTORY / "commit"  # of the results in the session
EQUIVALENT = ROOT / "tests/equivalent_mutants.toml"
REQUIRED = 0.9  # killed, of the mutants that are not equivalent
TIMEOUT = 400  # seconds; a mutant that loops forever is killed

# The tests of a module are those of the first prefix that it begins with, the quickest first.
TESTS = {
    "clip_jax/losses/distill": ("test_distill.py",),
    "clip_jax/losses": ("test_losses.py", "contracts/test_losses.py"),
    "clip_jax/training/step": (
        "test_meshes.py::test_caption_ids_are_equal_for_equal_captions_only",
        "test_meshes.py::test_equal_captions_as_positives_equal_the_formula_and_change_the_loss",
        "test_step.py",
        "test_distill.py",
    ),
    "clip_jax/training/optim": ("test_optim.py", "test_half_precision.py", "test_finetuning.py"),
    "clip_jax/training/checkpoint": (
        "test_checkpoint.py",
        "test_permissions.py::test_checkpoint_of_another_user_is_refused_and_not_renamed",
    ),
    "clip_jax/data/order": ("test_data_order.py",),
    "clip_jax/evals/metrics": ("test_evals_metrics.py", "test_evals_ties.py"),
    "clip_jax/evals/intervals": tuple(
        f"test_evals_metrics.py::test_{claim}"
        for claim in (
            "exact_interval_against_scipy",
            "invalid_arguments_of_intervals_are_refused",
            "strata_keep_their_sizes",
            "one_example_has_an_interval",
            "undefined_resamples_are_ignored",
            "a_mean_of_equal_hits_has_the_exact_interval",
            "the_seed_determines_the_interval_of_a_mean",
            "block_sizes_do_not_change_the_values",
            "intervals_have_the_nominal_coverage",
            "the_two_bootstraps_agree",
            "every_metric_is_inside_its_interval_which_the_seed_determines",
        )
    ),
    "clip_jax/evals/ranking": ("test_evals_ties.py", "test_evals_retrieval.py", "test_evals_metrics.py"),
    "clip_jax/evals/retrieval": ("test_evals_retrieval.py", "test_evals_ties.py"),
    "clip_jax/evals/zeroshot": ("test_evals_zeroshot.py", "test_evals_ties.py", "test_evals_association.py"),
    "clip_jax/tokenizers": ("test_tokenizers.py", "contracts/test_tokenizers.py"),
    "clip_jax/interop/conversion": (
        "test_naming.py::test_names_and_shapes_of_tensors_are_those_that_the_libraries_read",
        "test_bfloat16_weights.py::test_bfloat16_parameters_take_half_the_memory_and_are_never_float32",
        "test_reading.py",
        "test_convert.py",
    ),
    "clip_jax/interop/formats": ("contracts/test_formats.py", "test_reading.py"),
    "clip_jax/interop/infer_architecture": (
        "test_naming.py",
        "test_big_vision.py",
        "test_state_dicts.py",
        "test_reading.py",
    ),
    "clip_jax/interop/msgpack": ("test_msgpack.py",),
    "clip_jax/interop/name_tables": ("test_naming.py", "test_state_dicts.py", "test_big_vision.py"),
    "clip_jax/interop/naming": ("test_naming.py", "test_state_dicts.py", "test_big_vision.py"),
    "clip_jax/interop/npz": ("test_big_vision.py", "contracts/test_formats.py"),
    "clip_jax/interop/positions": ("test_reading.py",),
    "clip_jax/interop/reading": ("test_reading.py", "test_state_dicts.py", "test_big_vision.py"),
    "clip_jax/interop/safetensors": (
        "test_reading.py::test_safetensors_are_read_in_float32_float16_and_bfloat16",
        "contracts/test_formats.py",
        "test_reading.py",
    ),
    "clip_jax/interop/torch_": (
        "test_torch_file.py",
        "test_reading.py::test_unknown_files_are_refused_with_the_known_formats",
        "test_naming.py::test_wrapped_weights_are_read_from_files",
    ),
}
# Tests that are marked slow, for the mutants that survive the others.
SLOW = {
    "clip_jax/losses/distill": (
        "test_distill.py::test_the_loss_is_the_contrastive_loss_plus_the_weighted_distillation",
    ),
    "clip_jax/losses": ("contracts/test_losses.py",),
    "clip_jax/training/step": (
        "test_step.py",
        "test_meshes.py::test_micro_batches_give_the_same_gradient_with_a_frozen_tower",
    ),
}
# One replacement per binary operator: most of Cosmic Ray's eleven raise TypeError in any test. Comparisons by identity
# raise SyntaxWarning or are the same for small integers.
_BINARY = (
    "Add_Sub|Sub_Add|Mul_Div|Div_Mul|FloorDiv_Div|Mod_Div|Pow_Mul|LShift_RShift|RShift_LShift|BitAnd_BitOr|BitOr_BitAnd"
)
# Not operators: `*` and `**` of arguments, parameters and displays.
_STAR, _UNPACKING = re.compile("core/ReplaceBinaryOperator_(Mul|Pow)_"), re.compile(r"(^|[(\[{,:])\s*$")
_EXCLUDED = re.compile(rf"core/(ReplaceBinaryOperator_(?!({_BINARY})$)|ReplaceComparisonOperator_\w+_(Is|IsNot)$)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mutants", type=int, default=240, help="size of the sample")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sample")
    arguments = parser.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # an exception in JAX's callback of the garbage collector is ignored
    changed = update_clone()
    os.chdir(TREE)
    sys.path.insert(0, str(TREE))
    import_libraries()
    with use_db(SESSION) as session:
        draw(session, arguments.mutants, arguments.seed, changed)
        for interruption in (signal.SIGINT, signal.SIGTERM):
            signal.signal(interruption, signal.default_int_handler)
        try:
            for item in session.pending_work_items:
                session.set_result(item.job_id, run_mutant(*item.mutations))
        except KeyboardInterrupt:
            sys.exit("interrupted; the same command continues")
        sys.exit(report(session))


def import_libraries() -> None:
    """Import the libraries once: each mutant is tested in a fork. JAX starts no thread before its first array."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
    sys.dont_write_bytecode = True  # of mutants
    for name in (
        "jax",
        "flax.linen",
        "optax",
        "orbax.checkpoint",
        "tensorflow",
        "beartype",
        "ftfy",
        "safetensors.numpy",
    ):
        importlib.import_module(name)


def run_mutant(mutation: MutationSpec) -> WorkResult:
    module, operator = mutation.module_path, get_operator(mutation.operator_name)()
    code = module.read_text("utf-8")
    lines = code.splitlines(), mutate_code(code, operator, mutation.occurrence).splitlines()
    diff = "\n".join(difflib.unified_diff(*lines, str(module), str(module), n=1, lineterm=""))
    if _is_equivalent(module, diff):
        return WorkResult(WorkerOutcome.NORMAL, "", TestOutcome.SURVIVED, diff)
    check_tests(_prefix(str(module)))
    started = time.monotonic()
    with use_mutation(module, operator, mutation.occurrence):
        failed = run_tests(_prefix(str(module)))
    print(f"{'killed' if failed else 'survived'} in {time.monotonic() - started:.0f} s: {module}", flush=True)
    status = TestOutcome.KILLED if failed else TestOutcome.SURVIVED
    return WorkResult(WorkerOutcome.NORMAL, (DIRECTORY / "log").read_text()[-4000:], status, diff)


@functools.cache
def check_tests(prefix: str) -> None:
    """Exit if the tests of a module fail without a mutation."""
    started = time.monotonic()
    if run_tests(prefix):
        sys.exit(f"{(DIRECTORY / 'log').read_text()}\nthe tests of {prefix} fail without a mutation")
    print(f"{prefix}: {time.monotonic() - started:.0f} s without a mutation", flush=True)


def run_tests(prefix: str) -> bool:
    """Return whether a test of a module fails or does not end, in a fork of this process."""
    if not (pid := os.fork()):
        os.setsid()
        log = os.open(DIRECTORY / "log", os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
        os.dup2(log, 1), os.dup2(log, 2)
        code = 0
        for marks, tests in (("not slow", TESTS), ("slow", SLOW)):
            files = [f"tests/{file}" for file in tests.get(prefix, ())]
            code = code or (files and pytest.main(["-n0", "-x", "-q", "-pno:cacheprovider", "-m", marks, *files]))
        os._exit(bool(code))
    deadline = time.monotonic() + TIMEOUT
    try:
        while not (ended := os.waitpid(pid, os.WNOHANG))[0] and time.monotonic() < deadline:
            time.sleep(0.05)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
    return ended != (pid, 0)


def update_clone() -> set[str]:
    """Update the clone to the last commit. Returns the files that differ from the commit of the stored results."""
    head = _git("rev-parse", "HEAD", cwd=ROOT)
    if not TREE.exists():
        _git("clone", "-q", ROOT, TREE, cwd=ROOT)
    _git("fetch", "-q", ROOT, head, cwd=TREE)
    _git("checkout", "-q", "--force", "--detach", head, cwd=TREE)
    before = COMMIT.read_text() if COMMIT.exists() else head
    return set(_git("diff", "--name-only", before, head, cwd=TREE).split())


def draw(session: WorkDB, mutants: int, seed: int, changed: set[str]) -> None:
    """Write the mutants of the sample into the session, with the results that are still valid."""
    head = _git("rev-parse", "HEAD", cwd=TREE)
    same = COMMIT.exists() and COMMIT.read_text() == head
    valid = {
        item.job_id: result
        for item, result in session.completed_work_items
        if (same or _is_killed(result)) and str(item.mutations[0].module_path) not in changed
    }
    sampled = sample(mutants, seed)
    session.clear()
    session.add_work_items(sampled)
    for item in sampled:
        if item.job_id in valid:
            session.set_result(item.job_id, valid[item.job_id])
    COMMIT.write_text(head)


def sample(mutants: int, seed: int) -> list[WorkItem]:
    """Return a random sample: places in the code are drawn, then one mutant of each.

    Places have the order of hashes of the seed, the module, the line and the column: a change of the code keeps the
    rest of the sample.
    """
    modules = [path for path in sorted(pathlib.Path("clip_jax").rglob("*.py")) if _prefix(str(path))]
    with use_db(":memory:") as session:
        init(modules, session, {})
        mutations = [item.mutations[0] for item in session.work_items]
    source = {module: module.read_text("utf-8") for module in modules}
    annotations = {module: _annotations(text) for module, text in source.items()}
    places = collections.defaultdict(dict)  # mutations by hash
    for mutation in mutations:
        (row, column), module = mutation.start_pos, mutation.module_path
        lines = source[module].splitlines()
        name, before = mutation.operator_name, lines[row - 1][:column]
        is_annotation = any(begin <= (row, column) < end for begin, end in annotations[module])
        if is_annotation or _EXCLUDED.match(name) or (_STAR.match(name) and _UNPACKING.search(before)):
            continue
        place = _hash(seed, module, lines[row - 1], lines[:row].count(lines[row - 1]), column)
        places[place][_hash(place, name, len(places[place]))] = mutation
    items = (WorkItem.single(*min(places[place].items())) for place in sorted(places))
    drawn = list(itertools.islice(filter(_compiles, items), mutants))
    print(f"{len(drawn)} of {len(places)} places in {len(modules)} modules, seed {seed}", flush=True)
    return drawn


def _compiles(item: WorkItem) -> bool:
    """Return whether the mutant is Python: Cosmic Ray 8.7 raises for dotted names of exceptions."""
    (mutation,) = item.mutations
    code = mutation.module_path.read_text("utf-8")
    try:
        mutated = mutate_code(code, get_operator(mutation.operator_name)(), mutation.occurrence)
        compile(mutated, "", "exec")
    except (AttributeError, SyntaxError):
        return False
    return mutated != code


def _annotations(source: str) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Return begin and end (line, column) of the type annotations, which are not executed."""
    nodes = [getattr(node, name, None) for node in ast.walk(ast.parse(source)) for name in ("annotation", "returns")]
    return [((x.lineno, x.col_offset), (x.end_lineno, x.end_col_offset)) for x in nodes if x is not None]


def _hash(*values: object) -> str:
    return hashlib.sha256(repr(values).encode()).hexdigest()


def report(session: WorkDB) -> int:
    """Print the table of docs/testing.md and the survivors. Returns the exit code."""
    counts, survivors = collections.defaultdict(collections.Counter), []
    for item, result in session.completed_work_items:
        module = item.mutations[0].module_path
        status = "killed" if _is_killed(result) else "equivalent" if _is_equivalent(module, result.diff) else "survived"
        counts[str(module.parent)][status] += 1
        if status == "survived":
            survivors.append(result.diff)
    print(*survivors, sep="\n\n")
    total = sum(counts.values(), collections.Counter())
    print("| package | mutants | killed | equivalent | survived |\n|---|---|---|---|---|")
    for name, count in [*sorted(counts.items()), ("all", total)]:
        print(f"| `{name}` | {count.total()} | {count['killed']} | {count['equivalent']} | {count['survived']} |")
    fraction = total["killed"] / max(1, total["killed"] + total["survived"])
    print(f"killed: {fraction:.1%} of the mutants that are not equivalent; required: {REQUIRED:.0%}")
    return int(fraction < REQUIRED)


def _is_equivalent(module: pathlib.Path, diff: str) -> bool:
    """Return whether a mutant is in the list: by the first line that it adds, or "-" and the last that it removes."""
    changed = [line for line in diff.splitlines() if re.match(r"[+-](?!\+\+ |-- )", line)]
    added = [line[1:].strip() for line in changed if line[0] == "+" and line[1:].strip()]
    line = added[0] if added else changed[-1]
    listed = tomllib.loads(EQUIVALENT.read_text("utf-8"))["mutant"]
    return any((entry["module"], entry["line"]) == (str(module), line) for entry in listed)


def _is_killed(result: WorkResult) -> bool:
    return result.test_outcome == TestOutcome.KILLED


def _prefix(module: str) -> str | None:
    return next((prefix for prefix in TESTS if module.startswith(prefix)), None)


def _git(*arguments: object, cwd: pathlib.Path) -> str:
    return subprocess.check_output(["git", *map(str, arguments)], cwd=cwd, text=True).strip()


if __name__ == "__main__":
    main()
