//! `heddle check DIR`.

use std::process::ExitCode;

use anyhow::bail;
use api::mesh::MeshConfig;

use crate::{
    cli::{CheckArgs, Output},
    output,
};

pub(super) fn run(args: &CheckArgs) -> anyhow::Result<ExitCode> {
    if !args.dir.is_dir() {
        bail!(
            "{} is no folder: name one that holds the objects",
            args.dir.display()
        );
    }
    let report = control::check(&args.dir, &MeshConfig::default());
    match args.output {
        Output::Json => output::json(&report)?,
        Output::Table => {
            for problem in &report.problems {
                println!("{problem}");
            }
            let (errors, problems) = (report.errors(), report.problems.len());
            println!(
                "{} objects in {} files: {errors} errors, {} warnings",
                report.objects.len(),
                report.files,
                problems - errors
            );
        }
    }
    Ok(if report.errors() == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}
