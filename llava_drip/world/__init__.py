"""A rendered world of shapes with known truth: scenes, their texts, and the data set written from them."""

from llava_drip.world.dataset import WorldPaths, build_world
from llava_drip.world.edges import (
    BoundaryScores,
    boundary_f1,
    changes_along,
    score_boundaries,
    shown_by_patches,
    true_boundaries,
)
from llava_drip.world.labelled import LabelledScenes, labelled_scenes
from llava_drip.world.scenes import Scene, Thing, render, sample_scene, scene_at
from llava_drip.world.texts import Question, blind_accuracy, caption, questions

__all__ = [
    "BoundaryScores",
    "LabelledScenes",
    "Question",
    "Scene",
    "Thing",
    "WorldPaths",
    "blind_accuracy",
    "boundary_f1",
    "build_world",
    "caption",
    "changes_along",
    "labelled_scenes",
    "questions",
    "render",
    "sample_scene",
    "scene_at",
    "score_boundaries",
    "shown_by_patches",
    "true_boundaries",
]
