//! `shoal completions`: what a shell needs to complete commands and flags.

use crate::failure::Failure;

/// Print a completion script for a shell.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  shoal completions bash > ~/.local/share/bash-completion/completions/shoal
  shoal completions bash --program shoal-node > ~/.local/share/bash-completion/completions/shoal-node
  shoal completions zsh > \"${fpath[1]}/_shoal\"
  shoal completions fish > ~/.config/fish/completions/shoal.fish")]
pub struct Args {
    /// The shell to write for.
    shell: clap_complete::Shell,

    /// For which program: shoal or shoal-node.
    #[arg(long, value_name = "NAME", default_value = "shoal", value_parser = crate::PROGRAMS, hide_possible_values = true)]
    program: String,
}

/// Writes the script to stdout.
pub fn main(args: Args) -> anyhow::Result<()> {
    use std::io::Write;
    let mut script = Vec::new();
    let mut command = crate::program(&args.program);
    clap_complete::generate(args.shell, &mut command, &args.program, &mut script);
    std::io::stdout()
        .write_all(&script)
        .map_err(Failure::stdout)?;
    Ok(())
}
