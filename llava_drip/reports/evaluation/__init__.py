"""Result files of the programs in eval/ on one page: scores with intervals, two runs side by side, answers beside pictures.

results.py    a result file in one form: lines of figures with intervals, and what it says of itself
records.py    the questions behind a result, one by one, where its files still are what they were
paired.py     two results side by side: whether they may be compared, differences, answers that changed
pope_pairs.py differences of two runs of POPE
samples.py    questions whose pictures are shown, with the segments that the model saw
text.py       text of any origin made safe for HTML and Markdown
page.py       the page
"""
