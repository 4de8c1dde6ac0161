import torch

from emkd.samples import Dataset
from emkd.samples.encode import Encoder
from emkd.trainer.data.samples import Collator, EvaluationSamples
from emkd.trainer.loop.evaluation import evaluate_answers
from emkd.vlm import load
from tests import tiny
from tests.trainer import dense

V = len(tiny.VOCABULARY)


def test_accuracy_and_loss_are_those_of_the_model_alone(student_path, data_path):
    """Padding rows of the LM head are made to win everywhere: they are no candidates."""
    student = load(str(student_path))
    with torch.no_grad():
        student.model.lm_head.weight[V:] *= 1000
    samples = EvaluationSamples(Dataset(str(data_path)), Encoder(student.processor, 2))
    batches = [Collator(0)([samples[n] for n in part]) for part in ([0, 1, 2], [3], [4, 5])]
    found = evaluate_answers(student.model, batches, V)
    with torch.no_grad():
        views = [dense.view(student.model, student.processor, row, 16, V) for row in tiny.rows()]
    logits = torch.cat([view.answer_logits for view in views])
    ids = torch.cat([view.answer_ids for view in views])
    assert found["answer_tokens"] == len(ids) == 27
    assert found["accuracy"] == float((logits.argmax(1) == ids).double().mean())
    assert abs(found["loss"] - float(torch.nn.functional.cross_entropy(logits, ids))) < 1e-5
