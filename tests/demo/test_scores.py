"""demo/run.py: exact names count as right; shuffled images show other names."""

from __future__ import annotations

import pytest

from multi_token.demo.run import contains_name, is_exact_name, shuffled_images


@pytest.mark.parametrize("answer", ["dog", "Dog", " dog ", "dog.", "DOG. ", "dog ."])
def test_case_spaces_and_one_final_dot_do_not_matter(answer: str) -> None:
    assert is_exact_name(answer, "dog")


@pytest.mark.parametrize("answer", ["", "a dog", "dogs", "dog..", "dog dog", "hotdog", "dog, cat"])
def test_an_answer_with_more_or_less_than_the_name_is_wrong(answer: str) -> None:
    assert not is_exact_name(answer, "dog")


def test_a_name_is_contained_only_as_a_whole_word() -> None:
    assert contains_name("This is an image of a Cat, sitting.", "cat")
    assert not contains_name("This is a caterpillar.", "cat")
    assert not contains_name("This is a pineapple.", "apple")
    assert contains_name('The term "apple".', "apple")


@pytest.mark.parametrize(
    "names", [["a", "b"], ["a", "a", "b", "b"], ["a", "a", "b", "c"], list("abcdefghij") * 4]
)
@pytest.mark.parametrize("seed", range(20))
def test_every_question_gets_an_image_of_another_name(names: list[str], seed: int) -> None:
    images = shuffled_images(names, seed)
    assert sorted(images) == list(range(len(names)))
    assert all(names[image] != name for image, name in zip(images, names, strict=True))
    assert images == shuffled_images(names, seed)


def test_images_that_mostly_show_the_same_cannot_be_shuffled() -> None:
    with pytest.raises(ValueError, match="3 of 5"):
        shuffled_images(["a", "a", "a", "b", "c"], seed=0)
