//! `shoal man`: the manual pages, made from the same table as `--help`.

use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::Command;
use clap_mangen::Man;

use crate::failure::Failure;
use crate::terminal;

/// Write the manual pages into a folder.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  shoal man ~/.local/share/man/man1      then: man shoal, man shoal-run, man shoal-node
  shoal man | man -l -                   the page of `shoal` without installing it")]
pub struct Args {
    /// The folder; it is made [default: print the page of `shoal`].
    #[arg(value_name = "DIR")]
    folder: Option<PathBuf>,
}

/// Writes a page for each command, or prints the first.
pub fn main(args: Args) -> anyhow::Result<()> {
    // `shoal-node` is the page of `shoal node`, which is the same with three words more.
    let mut shoal = crate::program("shoal").disable_help_subcommand(true);
    shoal.build();
    let Some(folder) = args.folder else {
        let page = page(&shoal)?;
        std::io::stdout()
            .write_all(&page)
            .map_err(Failure::stdout)?;
        return Ok(());
    };
    let wrong = || format!("the manual pages for {}", folder.display());
    std::fs::create_dir_all(&folder).with_context(wrong)?;
    write(&shoal, &folder).with_context(wrong)?;
    terminal::note(format!(
        "the manual is in {}: man shoal, man shoal-run, man shoal-node",
        folder.display()
    ));
    Ok(())
}

fn write(command: &Command, folder: &Path) -> std::io::Result<()> {
    let name = Man::new(command.clone()).get_filename();
    std::fs::write(folder.join(name), page(command)?)?;
    let mut below = command
        .get_subcommands()
        .filter(|below| !below.is_hide_set());
    below.try_for_each(|below| write(below, folder))
}

/// A page whose examples keep their lines.
fn page(command: &Command) -> std::io::Result<Vec<u8>> {
    let man = Man::new(command.clone()).source(concat!("shoal ", env!("CARGO_PKG_VERSION")));
    let (mut page, mut examples) = (Vec::new(), Vec::new());
    man.render_title(&mut page)?;
    man.render_name_section(&mut page)?;
    man.render_synopsis_section(&mut page)?;
    man.render_description_section(&mut page)?;
    man.render_options_section(&mut page)?;
    if command.has_subcommands() {
        man.render_subcommands_section(&mut page)?;
    }
    man.render_extra_section(&mut examples)?;
    let examples = String::from_utf8_lossy(&examples);
    if let Some((_, examples)) = examples.split_once(".SH EXTRA\n") {
        write!(page, ".SH EXAMPLES\n.nf\n{examples}.fi\n")?;
    }
    Ok(page)
}

#[cfg(test)]
mod tests {
    #[test]
    fn there_is_a_page_for_each_command_and_its_examples_keep_their_lines() {
        let folder = tempfile::tempdir().unwrap();
        let args = super::Args {
            folder: Some(folder.path().to_owned()),
        };
        super::main(args).unwrap();
        let read = |name: &String| std::fs::read_to_string(folder.path().join(name)).unwrap();
        for command in crate::program("shoal").get_subcommands() {
            let page = read(&format!("shoal-{}.1", command.get_name()));
            assert!(
                page.contains(".SH EXAMPLES\n.nf\n"),
                "{}",
                command.get_name()
            );
        }
        assert!(read(&"shoal-node.1".to_owned()).contains("SHOAL_MEMORY"));
        assert!(read(&"shoal-node-pause.1".to_owned()).contains("shoal node resume"));
    }
}
