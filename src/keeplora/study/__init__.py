"""Studies: many runs held against each other (`keeplora compare`), settings chosen without test pictures (`keeplora tune`)."""
