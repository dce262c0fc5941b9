"""Which text may stand in a Lean proof: tactics, and nothing that begins a command or runs a program.

Lean's commands are open-ended: libraries add their own, and a command may begin wherever a tactic ends. So a
line that begins a step must begin with a known tactic, no word anywhere may be one that commands begin with
or belong to a family of such words, and no part of a name may lead to Lean's own programming interface.
"""

from __future__ import annotations

import re
from typing import Final

from copd_megatron.rewards.proofs.statement import RejectedError


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_TACTICS: Final = _words(
    """
    abel abel1 abel_nf absurd ac_nf ac_rfl aesop aesop_cat all_goals and_intros any_goals apply
    apply_assumption apply_fun apply_mod_cast apply_rfl apply_rules assumption assumption_mod_cast bound
    by_cases by_contra by_contradiction bv_omega calc cancel_denoms case case' cases cases' casesm
    change choose classical clear clear_value compute_degree congr congrm constructor constructorm
    continuity contradiction contrapose conv conv_lhs conv_rhs convert convert_to cutsat decide delta
    done dsimp eapply econstructor else enter eq_refl erw eta_expand eta_reduce eta_struct exact
    exact_mod_cast exacts exfalso exists expose_names ext ext1 fail_if_success false_or_by_contra fapply
    fconstructor field field_simp fin_cases filter_upwards first fix focus fun_cases fun_induction
    fun_prop funext gcongr generalize generalize_proofs grind grobner group have haveI if ifs induction
    induction' infer_instance infer_param inhabit injection injections interval_cases intro intros
    iterate itauto left let letI let_to_have lia lift lift_lets linarith linear_combination lhs match
    measurability mod_cast monicity mono move_add move_mul nlinarith next nofun nomatch noncomm_ring
    nontriviality norm_cast norm_num norm_num1 nth_rewrite nth_rw obtain omega on_goal peel pick_goal
    pi_lower_bound pi_upper_bound plausible positivity pull pull_cast push push_cast push_neg qify
    rcases rcongr reduce reduce_mod_char refine refine' refl rel rename rename_bvar rename_i repeat
    repeat' repeat1 repeat1' replace revert rewrite rfl rfl' rhs right ring ring1 ring1_nf ring_nf
    rintro rotate_left rotate_right rsuffices rw rw_mod_cast rwa set show show_term simp simp! simp?
    simp_all simp_all! simp_all? simp_all_arith simp_arith simp_intro simp_rw simp_wf simpa simpa!
    simpa? skip slice_lhs slice_rhs solve solve_by_elim specialize split split_ands split_ifs
    stop_at_first_error subsingleton subst subst_eqs subst_vars substs success_if_fail_with_msg suffices
    swap swap_var symm symm_saturate tauto then tfae_finish tfae_have transitivity triv trivial try
    type_check unfold unfold_let unhygienic unit_interval use use! use_discharger wlog with_reducible
    with_unfolding_all zify arg args
    """
)
"""What a step may begin with: the tactics of Lean and Mathlib that only build a proof."""
_COMMANDS: Final = _words(
    """
    sorry admit axiom theorem lemma example def abbrev instance opaque structure inductive class
    coinductive infix infixl infixr prefix postfix attribute set_option open export namespace section
    end import universe universes variable variables local scoped private protected noncomputable unseal
    seal nonrec extends where partial mutual deriving include omit alias irreducible_def add_decl_doc
    compile_inductive compile_def compile_inductive_on suppress_compilation unsuppress_compilation
    assert_exists assert_not_exists assert_not_imported library_note mk_iff_of_inductive_prop
    restate_axiom recall whatsnew count_heartbeats binder_predicate unif_hint unification_hint
    grind_pattern gen_injective_theorems proof_wanted prelude module public meta expose erase_attr
    show_panel_widgets with_panel_widgets by_elab native_decide reduceBool ofReduceBool reduceNat
    ofReduceNat trustCompiler implemented_by extern csimp constant constants command term_elab
    tactic_elab docs_recursive add_aesop_rules erase_aesop_rules sorryAx lcProof lcUnreachable lcAny
    lcCast lcErased polyrith hammer eval_expr
    """
)
"""Words that begin a command, change how the rest is read, run a program, or leave the kernel out."""
_FAMILY: Final = re.compile(
    r"run_|by_elab|elab|macro|syntax|notation|declare_|register_|builtin_|initialize|simproc|dsimproc|simprocs"
    r"|norm_num_ext|eval_expr|reduce_bool|dbg_|throw[A-Z]"
)
"""How words begin that define syntax or run programs; libraries add to them."""
_PROGRAMMING: Final = _words(
    """
    Lean IO System Elab Meta Macro MacroM Command Syntax TSyntax MetaM TermElabM TacticM CommandElabM
    CoreM EIO BaseIO ImportM Environment FilePath Process FS Qq ST EST STWorld RealWorld Parser Compiler
    ParserDescr Runtime Plugin Linter Server Lake MonadEnv Aesop Simprocs
    """
)
"""Parts of names that lead to Lean's own programming interface."""
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
"""ASCII only, and no quotes: what Lean reads as two words, a sign and a keyword, is never one here."""
_SIGNS = re.compile(r"#|@\[|`|\u00ab|%\[|[A-Za-z_]%")
_FIRST = re.compile(r"[^\W\d][\w'!?]*")
_OPENING, _CLOSING = "([{\u27e8\u2983", ")]}\u27e9\u2984"
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)


def check_proof_words(text: str) -> None:
    """Raises RejectedError unless a text is made of tactics alone, as far as words can tell."""
    sign = _SIGNS.search(text)
    if sign is not None:
        raise RejectedError(f"{sign.group()!r} in a proof")
    for match in _NAME.finditer(text):
        word = match.group()
        if (
            word in _COMMANDS
            or word in _PROGRAMMING
            or _FAMILY.match(word) is not None
            or "unsafe" in word.lower()
        ):
            raise RejectedError(f"{word!r} in a proof")
    _check_steps(text)


def _check_steps(text: str) -> None:
    """Every line that begins a step of the proof begins with a tactic, or with a sign."""
    base, depth = None, 0
    for line in _STRING.sub('""', text).split("\n"):
        stripped = line.strip()
        if not stripped:
            continue
        column = len(line) - len(line.lstrip())
        base = column if base is None else base
        if depth <= 0 and column <= base:
            first = _FIRST.match(stripped)
            if first is not None and first.group() not in _TACTICS:
                raise RejectedError(f"{first.group()[:60]!r} begins a step of a proof")
        depth += sum(line.count(sign) for sign in _OPENING) - sum(line.count(sign) for sign in _CLOSING)
