//! The program `shoal-node`: what it does is in the library beside it.

use std::process::ExitCode;

fn main() -> ExitCode {
    cli::shoal_node()
}
