"""Trained rankers at work: programs and tables for a server.

programs    a ranker as functions of named arrays, and the formats of their files
check       copied into each export: compares its files and results, and is a minimal server
README.md   the template of an export's description
"""
