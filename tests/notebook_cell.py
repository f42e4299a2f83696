"""Standard output as it is below a notebook's cell, without a notebook."""

import io


class OutStream(io.StringIO):
    """Plays ipykernel's class of this name, for Jupyter, Colab and Kaggle: it is no file and no terminal."""

    def lines(self) -> list[str]:
        """What a notebook shows: after a carriage return it writes over the line from its beginning."""
        shown = []
        for written in self.getvalue().split("\n"):
            line = ""
            for part in written.split("\r"):
                line = part + line[len(part) :]
            shown.append(line.rstrip())
        return shown


OutStream.__module__ = "ipykernel.iostream"
