"""What a run may choose: one set of names, with and without types."""

import dataclasses
import typing

from mlx_diffgemma.generation.settings import GenerationConfig, GenerationOptions


def test_the_options_of_generate_are_the_fields_of_the_config() -> None:
    assert typing.get_type_hints(GenerationOptions) == typing.get_type_hints(GenerationConfig)
    assert [f.name for f in dataclasses.fields(GenerationConfig)] == list(GenerationOptions.__annotations__)
