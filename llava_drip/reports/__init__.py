"""From the folders of training runs to what others read: tables, and repositories on the Hugging Face Hub.

run.py      a run's folder: what it was, and its epochs
table.py    runs side by side: metric, tokens, multiply-accumulates, cost
comparison.py  towers trained by one protocol: means and deviations over seeds
bundle.py   which files of a directory are the model, and how it is loaded
card.py     the model card
hub.py      upload

evaluation/ is the page over result files of the programs in eval/.
"""
