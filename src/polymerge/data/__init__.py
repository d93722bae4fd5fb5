"""Data files and answers.

rows.py    the one reader of JSONL
schema.py  what a row of one's own data must hold
score.py   the one judge of answers
"""
