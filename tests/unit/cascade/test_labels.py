"""What labels stand for, also where stages only evaluate or a gate went back."""

import dataclasses

from millrace.cascade.labels import Labels
from millrace.config.schema import EvaluateStage

from .campaign import history, recipe

BASE = recipe()
SFT, IF, MATH, CHAT, MOPD = BASE.stages
LOOK = EvaluateStage(name="look")
RECIPE = dataclasses.replace(BASE, stages=(EvaluateStage(name="first"), SFT, IF, LOOK, MATH, CHAT, MOPD))


def labels(**results) -> Labels:
    return Labels(RECIPE, history(**results))


def test_a_stage_that_only_evaluates_leads_to_the_weights_it_was_given():
    assert labels().result("look") == "rl-if" and labels().origin("rl-math") == "rl-if"
    assert labels().checkpoint("look") == "stage-02-rl-if"


def test_before_any_training_that_is_the_model_itself():
    assert labels().origin("sft") == "start" and labels().checkpoint("first") is None


def test_a_gate_that_went_back_moves_what_later_stages_start_from_and_not_its_own_checkpoint():
    back = labels(rl_if="sft")
    assert back.origin("rl-math") == "sft" and back.checkpoint("rl-if") == "stage-02-rl-if"


def test_a_gate_of_an_evaluation_that_went_back_moves_what_follows_and_not_what_was_evaluated():
    back = labels(look="sft")
    assert back.origin("rl-math") == "sft" and back.checkpoint("look") == "stage-02-rl-if"


def test_weights_in_the_middle_of_a_stage_have_a_checkpoint_of_their_own():
    assert labels().checkpoint("rl-if@2") == "stage-02-rl-if-step-000002"
    assert labels(rl_if="rl-if@2").origin("look") == "rl-if@2"
