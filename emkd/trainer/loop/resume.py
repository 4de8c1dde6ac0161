"""What a student has to agree on with its cache before anything is trained: chat template and pictures."""

from emkd.samples.render import end_token
from emkd.samples.template import adopt_template, check_places_images, describe_guess
from emkd.storage.cache import Cache
from emkd.trainer.report import log
from emkd.vlm.identity import check_field_of_view, image_differences, image_processor_settings
from emkd.vlm.loading import VisionLanguageModel, check_template
from emkd.vlm.pooling import family_of


def agree_about_pictures_and_text(cache: Cache | None, student: VisionLanguageModel, *, distils: bool) -> None:
    """The teacher's chat template decides the text; to learn from it (`distils`), a student has to see the same part of
    a picture. Tells what differs without being an obstacle.

    Raises GeometryMismatchError, TokenizerMismatchError where the template has no place for the student's images, and
    ModelError where there is no template at all.
    """
    if cache is not None:
        adopted = adopt_template(student.processor, cache.manifest.tokenizer.chat_template)
        if adopted.changed:
            log("the student has another chat template, or none: it is trained, and saved, with the teacher's")
        if adopted.guessed is not None:
            log(describe_guess(adopted.guessed))
        teacher, own = map(family_of, (cache.manifest.teacher.architecture, student.model.config.model_type))
        if teacher != own:
            log(
                f"the teacher is a {teacher}, the student a {own}: what only one of them writes around and within "
                "images is left out of the affinities that VLAD compares"
            )
        theirs, ours = cache.manifest.image_processor.settings, image_processor_settings(student.processor)
        if distils:
            check_field_of_view(theirs, ours)
        differing = image_differences(theirs, ours)
        if differing:
            log(f"student and teacher prepare images differently ({', '.join(differing)}): they may see other pictures")
    check_template(student.path, student.processor)
    if cache is not None and cache.totals.vision_tokens:
        check_places_images(student.processor)
    if end_token(student.processor) is None:
        log(
            "the chat template writes no end token behind answers: the student will not learn where to stop. If that "
            "is not meant, let the teacher's chat_template.jinja write one behind the assistant's turns, and cache anew"
        )
