//! The house style, as a test: what a reviewer would otherwise have to say again and again.
//!
//! `every_file_keeps_the_rules` looks at the whole tree and reports everything at once. The tests
//! in `samples` show for each rule that it fires, and what it lets pass.

mod markdown;
mod rules;
mod samples;
mod scan;

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use rules::{Exception, File};

/// Files that may break a rule, each with the reason.
const EXCEPTIONS: &[Exception] = &[];

/// Reads the tree below `top`, leaving out what `.gitignore` names.
///
/// # Errors
/// When a file cannot be read, or `.gitignore` holds something else than paths from the top.
fn read_tree(top: &Path) -> io::Result<Vec<File>> {
    let ignored = fs::read_to_string(top.join(".gitignore"))?;
    let ignored: Vec<&str> = ignored.lines().filter(|l| !l.is_empty()).collect();
    if let Some(pattern) = ignored.iter().find(|l| !l.starts_with('/') || l.contains('*')) {
        let what = format!(".gitignore: {pattern} is not a plain path from the top (/name)");
        return Err(io::Error::new(io::ErrorKind::InvalidData, what));
    }
    let mut files = Vec::new();
    let mut pending = vec![String::new()];
    while let Some(dir) = pending.pop() {
        for entry in fs::read_dir(top.join(&dir))? {
            let entry = entry?;
            let name = entry.file_name();
            let path = if dir.is_empty() {
                name.to_string_lossy().into_owned()
            } else {
                format!("{dir}/{}", name.to_string_lossy())
            };
            let kind = entry.file_type()?;
            if path == ".git" || ignored.contains(&format!("/{path}").as_str()) {
                continue;
            }
            if kind.is_dir() {
                pending.push(path);
            } else if kind.is_file() {
                let executable = entry.metadata()?.permissions().mode() & 0o100 != 0;
                files.push(File { path, bytes: fs::read(entry.path())?, executable });
            }
        }
    }
    Ok(files)
}

#[test]
fn every_file_keeps_the_rules() {
    let top = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the crate is not at the top");

    let files = read_tree(top).expect("the tree is readable");
    let violations = rules::check(&files, EXCEPTIONS);

    assert!(files.iter().any(|f| f.path == "Cargo.toml"), "looked at the wrong directory");
    let list: Vec<String> = violations.iter().map(ToString::to_string).collect();
    assert!(list.is_empty(), "{} violations:\n{}", list.len(), list.join("\n"));
}
