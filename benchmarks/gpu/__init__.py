"""What only a card can show, in parts of under six minutes: `make gpu`."""
