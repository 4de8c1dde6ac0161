"""Tests of emkd.storage."""
