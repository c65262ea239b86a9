"""Imports and exports of foreign formats; the only package that reads pickles."""
