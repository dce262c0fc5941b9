"""Proofs that a model wrote: real ones are accepted, and nothing else is."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from copd_megatron.config.schema import RewardConfig
from copd_megatron.errors import ConfigError
from copd_megatron.launch import doctor
from copd_megatron.rewards import Grader, registry, sandbox
from copd_megatron.rewards.proofs import RejectedError, compiler, coq, lean, read_statement
from copd_megatron.rewards.proofs.coq_script import Proof, read_proof, sentences
from copd_megatron.rewards.sandbox import bubblewrap
from copd_megatron.rewards.verifiers import proof as verifier
from tests.support.rollouts import rollout

HELD = sandbox.check() is None and coq.toolchain() is not None
with_coq = pytest.mark.skipif(not HELD, reason="needs coqc, coqchk and bubblewrap (apt-get install coq)")

ZERO = {"name": "add_zero", "statement": "forall n : nat, n + 0 = n"}
FALSE = {"name": "absurd", "statement": "1 = 2"}
SECONDS = 20.0


def statement(**fields: Any) -> str:
    return json.dumps({**ZERO, **fields})


def block(text: str) -> str:
    return f"By induction.\n```coq\n{text}\n```"


def grade(text: str, **fields: Any) -> float:
    return verifier.proof(block(text), statement(**fields), {"time_limit": SECONDS})


TREE = """Inductive tree : Type := Leaf | Node (left right : tree).
Fixpoint mirror (t : tree) : tree :=
  match t with Leaf => Leaf | Node l r => Node (mirror r) (mirror l) end.
Notation "~~ t" := (mirror t) (at level 30)."""
RIGHT: dict[str, tuple[str, dict[str, Any]]] = {
    "induction": ("induction n as [|m IH].\n- reflexivity.\n- simpl. rewrite IH. reflexivity.", {}),
    "with Proof and Qed": ("Proof.\n  intros n; induction n; simpl; auto.\nQed.", {}),
    "the theorem again": (
        "Theorem add_zero : forall n : nat, n + 0 = n.\nProof.\ninduction n; simpl; congruence.\nQed.",
        {},
    ),
    "a lemma first": (
        "Lemma helper : forall n, n = n + 0.\nProof.\n  induction n. { reflexivity. }\n"
        "  simpl. now f_equal.\nQed.\nTheorem add_zero : forall n : nat, n + 0 = n.\n"
        "Proof. intro n. now rewrite <- helper. Qed.",
        {},
    ),
    "imports and a comment": (
        "Require Import Lia.\nTheorem add_zero : forall n : nat, n + 0 = n.\n"
        "Proof. (* easy (* Qed. *) *) lia. Qed.",
        {"header": "Require Import Lia."},
    ),
    "definitions and a notation": (
        "induction t as [|l IHl r IHr]; simpl; [reflexivity|]. rewrite IHl, IHr. reflexivity.",
        {"definitions": TREE, "name": "twice", "statement": "forall t : tree, ~~ (~~ t) = t"},
    ),
    "integers in their scope": (
        "intros; ring.",
        {
            "header": "Require Import ZArith Ring.\nOpen Scope Z_scope.",
            "statement": "forall a b : Z, (a + b) * (a - b) = a * a - b * b",
        },
    ),
    "a sum type": ("exact (inl 3).", {"statement": "nat + bool"}),
    "an axiom that is allowed": (
        "intros f g H. apply functional_extensionality. exact H.",
        {
            "header": "Require Import FunctionalExtensionality.",
            "statement": "forall f g : nat -> nat, (forall x, f x = g x) -> f = g",
            "axioms": ["functional_extensionality_dep"],
        },
    ),
    "an assumption of the sample": (
        "intros x. apply step.",
        {
            "definitions": "Parameter P : nat -> Prop.\nAxiom step : forall x, P x.",
            "statement": "forall x, P x",
        },
    ),
    "bullets, braces and selectors": (
        "intros n. assert (H : 0 + n = n) by reflexivity.\ninduction n.\n"
        "2: { simpl. f_equal. apply IHn. auto. }\n"
        "all: auto.",
        {},
    ),
}


@with_coq
@pytest.mark.parametrize("kind", RIGHT)
def test_proofs_are_accepted(kind: str) -> None:
    text, fields = RIGHT[kind]
    assert grade(text, **fields) == 1.0


@with_coq
def test_text_between_proof_and_qed_is_a_proof() -> None:
    response = "<think>Proof. wrong. Qed.</think>So:\nProof. induction n; simpl; congruence. Qed.\nDone."
    assert verifier.proof(response, statement(), {"time_limit": SECONDS}) == 1.0


FALSE_AS_TRUE = "Theorem absurd : 1 = 2. Proof. "
CHEATS = {
    "admit": "admit.",
    "Admitted": "Admitted.",
    "give_up": "give_up.",
    "nothing": "",
    "an axiom": "Axiom cheat : False.\n" + FALSE_AS_TRUE + "destruct cheat. Qed.",
    "a parameter": "Parameter cheat : 1 = 2.\n" + FALSE_AS_TRUE + "exact cheat. Qed.",
    "a hypothesis": "Hypothesis cheat : 1 = 2.\n" + FALSE_AS_TRUE + "exact cheat. Qed.",
    "a variable in a section": "Section S. Variable cheat : 1 = 2.\n" + FALSE_AS_TRUE + "exact cheat. Qed.",
    "a conjecture": "Conjecture cheat : 1 = 2.\n" + FALSE_AS_TRUE + "exact cheat. Qed.",
    "a context": "Context (cheat : 1 = 2).\n" + FALSE_AS_TRUE + "exact cheat. Qed.",
    "an admitted lemma": "Lemma cheat : 1 = 2.\nAdmitted.\n" + FALSE_AS_TRUE + "exact cheat. Qed.",
    "a lemma that stays open": "Lemma cheat : 1 = 2.\n" + FALSE_AS_TRUE + "exact cheat. Qed.",
    "another statement of that name": "Theorem absurd : 1 = 1.\nProof. reflexivity. Qed.",
    "another theorem": "Theorem fine : 1 = 1.\nProof. reflexivity. Qed.",
    "ended early": "Abort. Theorem absurd : 1 = 1. reflexivity.",
    "ended early and renamed": "reflexivity. Qed. Theorem other : True. exact I.",
    "Defined and again": "Abort. Definition absurd := I.",
    "equality redefined": 'Notation "x = y" := True.\n' + FALSE_AS_TRUE + "exact I. Qed.",
    "a number redefined": 'Notation "2" := 1.\n' + FALSE_AS_TRUE + "reflexivity. Qed.",
    "eq redefined": "Definition eq (A : Type) (x y : A) := True.\n" + FALSE_AS_TRUE + "exact I. Qed.",
    "a scope": "Open Scope bool_scope.\nreflexivity.",
    "no guard": "Unset Guard Checking.\nLemma loop : 1 = 2. Proof. fix loop 1. Qed.",
    "no guard, attribute": "#[bypass_check(guard)] Fixpoint f (n : nat) : 1 = 2 := f n.\nexact (f 0).",
    "no positivity": "Unset Positivity Checking. exact I.",
    "no universes": "Unset Universe Checking. exact I.",
    "type in type": "Set Universe Polymorphism. exact I.",
    "a loaded file": 'Load "/etc/passwd". exact I.',
    "a library with axioms": "Require Import Classical ProofIrrelevance. exact I.",
    "a load path": 'Add LoadPath "/tmp" as X. exact I.',
    "a written file": 'Redirect "CopdCheck" Print nat. exact I.',
    "extraction": 'Extraction "x.ml" nat. exact I.',
    "a plugin": 'Declare ML Module "x". exact I.',
    "back": "Back 1. exact I.",
    "undo": "Undo. exact I.",
    "reset": "Reset Initial. exact I.",
    "restart": "Restart. exact I.",
    "a tactic of its own": "Ltac cheat := admit. cheat.",
    "hidden in a comment": '(* " *) Axiom cheat : 1 = 2. (* " *) exact cheat.',
    "hidden in a string": 'idtac "(*". Axiom cheat : 1 = 2. idtac "*)". exact cheat.',
    "an open comment": "reflexivity. (* ",
    "an open string": 'idtac "',
    "an open sentence": "exact (eq_refl",
    "behind a bullet": "- Axiom cheat : 1 = 2. exact cheat.",
    "behind a brace": "{ Qed. Axiom cheat : 1 = 2. }",
    "behind a selector": "all: Admitted.",
    "no blank after the stop": "idtac.Axiom cheat : 1 = 2. exact cheat.",
    "a failing proof": "reflexivity.",
    "a cast": "exact (eq_refl : 1 = 2).",
    "the wrong assistant": "by simp",
    "a huge proof": "idtac. " * 20_000,
    "a loop": "repeat (assert True by exact I).",
    "a term that is admitted": "exact (ltac:(admit)).",
    "Obj.magic": "exact (Obj.magic I).",
    "a fence in the proof": "```\n```coq\nreflexivity.",
}
COMPILED = frozenset(
    {
        *("nothing", "a failing proof", "a cast", "Obj.magic", "the wrong assistant", "a fence in the proof"),
        *("another statement of that name", "no blank after the stop", "a loop"),
    }
)
"""Those whose sentences are all tactics, or whose lemma is left out: Coq refuses them."""


@pytest.mark.parametrize("cheat", sorted(set(CHEATS) - COMPILED))
def test_cheats_are_refused_before_anything_runs(cheat: str) -> None:
    with pytest.raises(RejectedError):
        read_proof(coq._proof_text(block(CHEATS[cheat])), "absurd", "")


@with_coq
@pytest.mark.parametrize("cheat", sorted(COMPILED - {"a loop"}))
def test_cheats_score_nothing(cheat: str) -> None:
    assert verifier.proof(block(CHEATS[cheat]), json.dumps(FALSE), {"time_limit": SECONDS}) == 0.0


@with_coq
@pytest.mark.slow
@pytest.mark.parametrize("cheat", sorted(CHEATS))
def test_all_cheats_score_nothing(cheat: str) -> None:
    assert verifier.proof(block(CHEATS[cheat]), json.dumps(FALSE), {"time_limit": 5.0}) == 0.0


PAST_THE_WORDS = {
    "an axiom": "Axiom cheat : 1 = 2.\nTheorem absurd : 1 = 2. Proof. exact cheat. Qed.",
    "an admitted theorem": "Theorem absurd : 1 = 2. Admitted.",
    "no guard": "Unset Guard Checking.\nFixpoint f (n : nat) : 1 = 2 := f n.\n"
    "Theorem absurd : 1 = 2. Proof. exact (f 0). Qed.",
    "no universes": "Unset Universe Checking.\nTheorem absurd : 1 = 1. Proof. reflexivity. Qed.",
    "equality redefined": 'Notation "x = y" := True : type_scope.\n'
    "Theorem absurd : 1 = 2. Proof. exact I. Qed.",
    "eq redefined": "Definition eq (A : Type) (x y : A) := True.\n"
    'Notation "x = y" := (eq _ x y) : type_scope.\n'
    "Theorem absurd : 1 = 2. Proof. exact I. Qed.",
    "another statement": "Theorem absurd : 1 = 1. Proof. reflexivity. Qed.",
    "a module of our name": "Module CopdGiven. Definition copd_goal := True. End CopdGiven.\n"
    "Theorem absurd : CopdGiven.copd_goal. Proof. exact I. Qed.",
    "an axiom of an allowed name": "Module M. Axiom allowed : 1 = 2. End M.\n"
    "Theorem absurd : 1 = 2. Proof. exact M.allowed. Qed.",
    "an inductive with a bad occurrence": "Unset Positivity Checking.\n"
    "Inductive bad := B (f : bad -> 1 = 2).\n"
    "Definition no (b : bad) : 1 = 2 := match b with B f => f b end.\n"
    "Theorem absurd : 1 = 2. Proof. exact (no (B no)). Qed.",
    "no theorem": "Definition nothing := 1.",
}


@with_coq
@pytest.mark.parametrize("cheat", PAST_THE_WORDS)
def test_the_check_alone_holds(cheat: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the candidate file says, the check file is ours."""
    monkeypatch.setattr(coq, "_candidate", lambda statement, proof: PAST_THE_WORDS[cheat])
    answer = read_statement(json.dumps({**FALSE, "axioms": ["allowed"]}))
    with pytest.raises(RejectedError, match=r"rests on|not the statement|Coq says"):
        coq.judge(answer, block("idtac."), seconds=SECONDS)


@with_coq
def test_a_proof_without_end_costs_its_time_limit() -> None:
    endless = "assert (forall n, n < 0 -> False) by (intros; repeat (pose proof I)). reflexivity."
    assert verifier.proof(block(endless), json.dumps(FALSE), {"time_limit": 1}) == 0.0


@with_coq
@pytest.mark.parametrize(
    "fields",
    [
        {"statement": "forall n : nat, n +"},
        {"statement": "unknown = 1"},
        {"header": "Require Import NoSuchLibrary."},
        {"definitions": "Definition x := ."},
    ],
)
def test_a_statement_that_does_not_compile_is_an_error_of_the_sample(fields: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="does not compile"):
        grade("auto.", **fields)


@pytest.mark.parametrize(
    "answer",
    [
        "no json",
        "[]",
        "{}",
        '{"name": "t"}',
        '{"name": "t", "statement": ""}',
        '{"name": "t.", "statement": "True"}',
        '{"name": "copd_check", "statement": "True"}',
        '{"name": "t", "statement": "True", "proof": "exact I."}',
        '{"name": "t", "statement": "True", "assistant": "agda"}',
        '{"name": "t", "statement": "True", "axioms": "classic"}',
    ],
)
def test_bad_statements_are_an_error_of_the_sample(answer: str) -> None:
    with pytest.raises(ValueError):
        read_statement(answer)


@pytest.mark.parametrize("header", ["Inductive t := A.", "Axiom a : False.", "Unset Guard Checking."])
def test_a_header_defines_nothing(header: str) -> None:
    with pytest.raises(ValueError, match="definitions"):
        coq.check_header(header)


def test_sentences() -> None:
    assert sentences("intros n.  apply Nat.add_0_r.\n- auto.") == [
        "intros n.",
        "apply Nat.add_0_r.",
        "- auto.",
    ]
    assert sentences("a (* x. (* y. *) *) b.") == ["a   b."]
    assert sentences('idtac "a. b".') == ['idtac "a. b".']
    assert sentences("{ auto. }") == ["{ auto.", "}"]
    assert read_proof("auto. Qed.", "t", "") == Proof((), ("auto.",))


@pytest.mark.parametrize(
    ("printed", "names"),
    [
        ("Closed under the global context\n", []),
        ("Axioms:\na : False\nM.b\n  : forall x,\n    x = x\n", ["a", "M.b"]),
        ("", None),
        ("Axioms:\nf is assumed to be guarded.", None),
        ("Section Variables:\nx : nat", None),
    ],
)
def test_assumptions(printed: str, names: list[str] | None) -> None:
    if names is None:
        with pytest.raises(RejectedError):
            coq.assumptions(printed)
    else:
        assert coq.assumptions(printed) == names


@with_coq
def test_the_grader_checks_proofs_in_its_workers() -> None:
    with Grader(RewardConfig(verifiers=["proof"], timeout_seconds=60.0)) as grader:
        right = rollout(block("induction n; simpl; congruence."), statement(), "proof", key="right")
        wrong = rollout(block("Admitted."), statement(), "proof", key="wrong")
        assert [item.reward for item in grader.grade([right, wrong])] == [1.0, 0.0]
        assert grader.counters()["failed"] == 0


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder of compiled statements."""
    monkeypatch.setattr(compiler, "_folder", tmp_path)
    return tmp_path


@with_coq
def test_a_statement_is_compiled_once(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    make = compiler.Compiler.make

    def counted(self: compiler.Compiler, module: str, *rest: Any) -> bytes | None:
        made.append(module)
        return make(self, module, *rest)

    monkeypatch.setattr(compiler.Compiler, "make", counted)
    right = "induction n; simpl; congruence."
    assert [grade(right), grade("reflexivity."), grade(right)] == [1.0, 0.0, 1.0]
    assert made == ["CopdGiven", *["CopdCandidate"] * 3] and len(list(kept.iterdir())) == 1
    assert grade(right, definitions="Definition unused := 1.") == 1.0
    assert made.count("CopdGiven") == 2, "another text is another statement"


@with_coq
def test_no_response_reaches_the_compiled_statements(kept: Path) -> None:
    """Whatever runs in the candidate's place finds no such folder."""
    grade("reflexivity.")
    (file,) = kept.iterdir()
    before = file.read_bytes()
    for path in (str(file), str(kept)):
        program = f"import os\nprint(os.path.exists({path!r}))\nopen({str(file)!r}, 'wb').write(b'x')"
        found = sandbox.run(program.encode())
        assert (found.ended, found.output) == (sandbox.Ended.error, b"False\n")
    assert file.read_bytes() == before


def test_without_a_sandbox_no_statement_is_kept(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(bubblewrap.SWITCH, "1")
    monkeypatch.setattr(compiler.Compiler, "make", lambda *_: b"made")
    assert compiler._statement(_compiler(), "text", 1.0) == b"made" and not list(kept.iterdir())


def test_statements_used_longest_ago_are_dropped(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "_MAX_KEPT", 3)
    monkeypatch.setattr(compiler, "_MAX_KEPT_BYTES", 25)
    monkeypatch.setattr(compiler.Compiler, "make", lambda self, module, text, *_: text.encode() * 10)
    for text in ("a", "b", "a", "c"):
        assert compiler._statement(_compiler(), text, 1.0) == text.encode() * 10
    assert sorted(file.read_bytes()[:1] for file in kept.iterdir()) == [b"a", b"c"]
    monkeypatch.setattr(compiler.Compiler, "make", lambda *_: None)
    assert compiler._statement(_compiler(), "d", 1.0) is None and len(list(kept.iterdir())) == 2


def _compiler() -> compiler.Compiler:
    return compiler.Compiler(
        source=".v",
        compiled=".vo",
        compile=lambda module: ["coqc", module],
        mounts=(),
        environment={},
        memory_bytes=1,
        total_memory_bytes=1,
    )


# ---- Lean -------------------------------------------------------------------------------------------------

LEAN = {"assistant": "lean", "name": "add_zero", "statement": "\u2200 n : Nat, n + 0 = n"}


@pytest.mark.parametrize(
    "text",
    [
        "sorry",
        "admit",
        "native_decide",
        "exact sorryAx _\naxiom x : False",
        "rfl\n\ntheorem other : True := trivial",
        "run_tac do pure ()",
        "set_option debug.skipKernelTC true in rfl",
        "open Lean in rfl",
        "simp\n#eval 1",
        "exact (by elab)",
        "@[simp] rfl",
        'rfl\nmacro "x" : tactic => `(tactic| rfl)',
        "/- open",
        "-/ rfl",
        "theorem other : True := by trivial",
        "exact \u00aba b\u00bb",
        'run_elab _root_.IO.FS.writeFile "x" "y"',
        "simp\n\nrun_elab do\n  let e \u2190 getEnv\n  setEnv e",
        "exact foo run_tacq do pure ()",
        "rfl\nsimproc foo (_ + _) := fun e => do return .continue",
        "rfl\nsimproc_decl foo (_) := fun e => pure .continue",
        "rfl\nbuiltin_dsimproc foo (_) := fun e => pure .continue",
        'rfl\nnotation3 "x" => True',
        "rfl\nirreducible_def x := 1",
        "rfl\nalias t := f",
        "rfl\nregister_simp_attr x",
        "rfl\ndeclare_aesop_rule_sets [x]",
        "rfl\nsome_command_that_nobody_knows x",
        "rfl\n  where x := 1",
        "exact _root_.Lean.Elab.admitGoal",
        "exact Foo.Lean.x",
        "simp (config := unsafeCast 0)",
        "simp (maxSteps := Nat.unsafeIO 0)",
        "exact `(x)",
        "exact \u03bbopen x",
        "exact 'a'open x",
        "exact 1open x",
        "exact (x).open",
        "exact h\u2081open",
        "exact eval% x",
        "rfl; initialize x : Nat \u2190 pure 1",
    ],
)
def test_lean_cheats_are_refused_unread(text: str) -> None:
    with pytest.raises(RejectedError):
        lean.read_body(f"```lean\n{text}\n```", "add_zero")


def test_a_lean_proof_is_read() -> None:
    again = "theorem add_zero : \u2200 n : Nat, n + 0 = n := by\n  intro n -- sorry\n  rfl"
    for text in (again, "  intro n /- open -/\n  rfl", "by\n  intro n\n  rfl"):
        body = lean.read_body(f"```lean4\n{text}\n```", "add_zero")
        assert body.split() == ["intro", "n", "rfl"]


@pytest.mark.parametrize(
    "text",
    [
        "  induction n with\n  | zero => rfl\n  | succ n ih => simp [Nat.add_succ, ih]",
        "  rcases h with \u27e8a, b\u27e9\n  \u00b7 exact a"
        "\n  \u00b7 nlinarith [sq_nonneg (a - b),\n  mul_pos ha hb]",
        "  have h : 0 < n := by\n    omega\n  calc a = b := by ring"
        "\n    _ = c := by norm_num\n  <;> linarith",
        "  obtain \u27e8k, hk\u27e9 := h\n  refine' \u27e8k, ?_\u27e9"
        "\n  simp? at hk \u22a2\n  exact (List.prefix_append x y).trans hk",
        "  intro x hx; rw [eval_add, Set.mem_setOf_eq]; exact_mod_cast hx.le",
    ],
)
def test_usual_lean_proofs_are_read(text: str) -> None:
    assert lean.read_body(f"```lean\n{text}\n```", "add_zero") == text


FAKE_CHECKER = """#!/bin/sh
[ -f CopdCandidate.olean ] && [ "$*" = "CopdCandidate CopdCheck" ] || exit 1
while read -r line; do
    case $line in *past*) exit 1 ;; esac
done < CopdCandidate.olean
"""
FAKE_LEAN = """#!/bin/sh
if [ "$1" = --print-prefix ]; then echo {prefix}; exit 0; fi
while [ $# -gt 1 ]; do
    if [ "$1" = -o ]; then out=$2; fi
    shift
done
if [ "$1" = CopdCheck.lean ]; then
    read -r first < CopdCandidate.olean
    [ "$first" = "olean of CopdCandidate.lean" ] || exit 1
    echo "'copdCheck' depends on axioms: [propext{more}]"
    exit 0
fi
while read -r line; do
    case $line in *fail*) exit 1 ;; esac
done < "$1"
echo "olean of $1" > "$out"
while read -r line; do echo "$line" >> "$out"; done < "$1"
"""


@pytest.fixture
def fake_lean(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[None]:
    """A program that takes Lean's arguments, to see that they are put together and that files get through."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        program = folder / "bin" / "lean"
        program.parent.mkdir()
        (folder / "library").mkdir()
        program.write_text(FAKE_LEAN.format(prefix=folder, more=request.param))
        program.chmod(0o755)
        checker = program.with_name("leanchecker")
        checker.write_text(FAKE_CHECKER)
        checker.chmod(0o755)
        monkeypatch.delenv(lean.CHECKER, raising=False)
        monkeypatch.setenv(lean.VARIABLE, str(program))
        monkeypatch.setenv("LEAN_PATH", str(folder / "library"))
        mounts = property(lambda self: (self.prefix, *self.path, "/bin/sh"))
        monkeypatch.setattr(lean.Toolchain, "mounts", mounts)
        lean.toolchain.cache_clear()
        yield
    lean.toolchain.cache_clear()


@pytest.mark.skipif(sandbox.check() is not None, reason="needs bubblewrap")
@pytest.mark.usefixtures("fake_lean")
@pytest.mark.parametrize(
    ("fake_lean", "body", "reward"),
    [("", "rfl", 1.0), ("", "apply fail", 0.0), (", sorryAx", "rfl", 0.0), ("", "exact past", 0.0)],
    indirect=["fake_lean"],
)
def test_how_lean_is_called(body: str, reward: float) -> None:
    found = lean.toolchain()
    assert found is not None and found.environment["LEAN_PATH"].startswith(".:/")
    assert verifier.proof(f"```lean\n{body}\n```", json.dumps(LEAN), {}) == reward


@pytest.mark.usefixtures("fake_lean")
@pytest.mark.parametrize("fake_lean", [""], indirect=True)
def test_lean_without_a_checker_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(lean.CHECKER, "/nowhere/lean4checker")
    lean.toolchain.cache_clear()
    assert lean.toolchain() is None and "replays its proofs through the kernel" in lean.problem()
    with pytest.raises(sandbox.SandboxError, match=lean.CHECKER):
        verifier.proof("```lean\nrfl\n```", json.dumps(LEAN), {})
    monkeypatch.setenv(lean.CHECKER, "none")
    lean.toolchain.cache_clear()
    found = lean.toolchain()
    assert found is not None and found.checker is None


@pytest.mark.skipif(
    lean.toolchain() is None or sandbox.check() is not None, reason="needs Lean 4 (COPD_LEAN) and bubblewrap"
)
def test_lean_checks_proofs() -> None:
    for text, reward in (("intro n\nrfl", 1.0), ("intro n\nexact absurd rfl", 0.0)):
        assert verifier.proof(f"```lean\n{text}\n```", json.dumps(LEAN), {"time_limit": 60}) == reward


# ---- where there is none ----------------------------------------------------------------------------------


def test_without_an_assistant_the_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coq, "toolchain", lambda: None)
    monkeypatch.setattr(lean, "toolchain", lambda: None)
    monkeypatch.setattr(sandbox, "require", lambda: None)
    with pytest.raises(ConfigError, match=r"apt-get install coq.*COPD_LEAN"):
        registry.check_requirements(["proof"])
    assert doctor._proof_assistants().status is doctor.Status.missing
