"""One pair step, and what makes it cheap."""
