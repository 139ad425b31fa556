"""What tokens cost the assistant: steps of both stages at several compressions, packed and padded, measured side by side.

    plan.py      what is measured: shapes of language models, cases, batches
    lengths.py   how long samples are, from a conversation file or a list of lengths
    parts.py     the assistant of a plan, and rows of its lengths
    clock.py     where the time of a step goes: tower, projector, language model, optimizer
    steps.py     steps of the Trainer that training uses, whose case changes from step to step
    losses.py    each sample's loss, packed and padded
    survey.py    all of it, as plain records
    tables.py    as Markdown

Its program is scripts/measure_assistant.py.
"""
