//! `shoal completions`: what a shell needs to complete commands and flags.

use clap::CommandFactory;

use crate::failure::Failure;

/// Print a completion script for a shell.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  shoal completions bash > ~/.local/share/bash-completion/completions/shoal
  shoal completions zsh > \"${fpath[1]}/_shoal\"
  shoal completions fish > ~/.config/fish/completions/shoal.fish")]
pub struct Args {
    /// The shell to write for.
    shell: clap_complete::Shell,
}

/// Writes the script to stdout.
pub fn main(args: Args) -> anyhow::Result<()> {
    use std::io::Write;
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut crate::Cli::command(), "shoal", &mut script);
    std::io::stdout()
        .write_all(&script)
        .map_err(Failure::stdout)?;
    Ok(())
}
