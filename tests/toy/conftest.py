"""The files of an op that tests/test_new_op.py adds to a copy of the project: no tests of this one."""

collect_ignore_glob = ["*"]
