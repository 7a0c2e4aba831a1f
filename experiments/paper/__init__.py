"""The paper's claims and figures, beside what was measured here."""
