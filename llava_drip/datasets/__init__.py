"""Public data sets: where their files lie, and how they are fetched whole, checked and unpacked.

    registry.py   what each name stands for: files, sizes, checksums, counts, licences, and where each fact was read
    http.py       one file over HTTP: goes on after an interruption, tries again, notices a file that changed on the server
    hub.py        one file of a Hugging Face data set, by huggingface_hub
    unpack.py     a zip: nothing outside its folder, goes on after an interruption, a half-unpacked one is noticed
    counts.py     rows and pictures against the numbers that are published
    download.py   a whole data set: what is missing, whether it fits on the disk, the licence, the download, the checks

Everything is tested against a server on one machine (tests/data_sets/data_server.py).
"""
