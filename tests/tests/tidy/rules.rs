//! The rules. Each is a function from a file, or from the whole tree, to complaints.
//!
//! Invariant: a rule never stops at its first complaint, and no rule hides another.

use std::collections::BTreeSet;
use std::fmt;
use std::path::Path;

use crate::markdown;
use crate::scan::{self, Source, Token};

const COLUMNS_MAX: usize = 100;
const FILE_LINES_MAX: usize = 500;
const FILE_LINES_HARD_MAX: usize = 700;
const FUNCTION_LINES_MAX: usize = 70;
const PARAMETERS_MAX: usize = 6;
const FILE_BYTES_MAX: usize = 1 << 20;

/// What may stand at the top of the tree, besides files whose name starts with a dot.
const TOP_LEVEL: [&str; 15] = [
    "ARCHITECTURE.md",
    "Cargo.lock",
    "Cargo.toml",
    "Makefile",
    "README.md",
    "benches",
    "blockd",
    "clippy.toml",
    "docs",
    "forkd",
    "format",
    "rustfmt.toml",
    "tests",
    "tools",
    "vhost",
];

/// Name endings of files that people read and edit; everything else is data.
const TEXT_ENDINGS: [&str; 14] = [
    ".fio", ".json", ".lock", ".md", ".py", ".rs", ".service", ".sh", ".socket", ".svg", ".toml",
    ".txt", ".yaml", ".yml",
];

/// Which rule was broken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Rule {
    Columns,
    ControlCharacter,
    Executable,
    FileHead,
    FileLength,
    FileSize,
    FinalNewline,
    FunctionLength,
    IgnoredTest,
    Link,
    Parameters,
    Placeholder,
    SafetyNote,
    Tab,
    TopLevel,
    TrailingSpace,
    Unfinished,
    UnusedException,
}

impl Rule {
    /// Every rule, so that the samples can be shown to be complete.
    pub const ALL: [Rule; 18] = [
        Rule::Columns,
        Rule::ControlCharacter,
        Rule::Executable,
        Rule::FileHead,
        Rule::FileLength,
        Rule::FileSize,
        Rule::FinalNewline,
        Rule::FunctionLength,
        Rule::IgnoredTest,
        Rule::Link,
        Rule::Parameters,
        Rule::Placeholder,
        Rule::SafetyNote,
        Rule::Tab,
        Rule::TopLevel,
        Rule::TrailingSpace,
        Rule::Unfinished,
        Rule::UnusedException,
    ];
}

/// A file of the tree. `path` is relative to the top, with slashes.
#[derive(Debug, Clone)]
pub struct File {
    pub path: String,
    pub bytes: Vec<u8>,
    pub executable: bool,
}

/// A file that may break a rule, and why.
pub struct Exception {
    pub path: &'static str,
    pub rule: Rule,
    pub reason: &'static str,
}

/// One complaint; `line` counts from 1.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Violation {
    pub path: String,
    pub line: usize,
    pub rule: Rule,
    pub what: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {:?}: {}", self.path, self.line, self.rule, self.what)
    }
}

/// Collects the complaints about one file.
struct Report<'a> {
    path: &'a str,
    found: &'a mut Vec<Violation>,
}

impl Report<'_> {
    /// `line` counts from 0.
    fn add(&mut self, line: usize, rule: Rule, what: impl Into<String>) {
        let path = self.path.to_owned();
        self.found.push(Violation { path, line: line + 1, rule, what: what.into() });
    }
}

/// Checks the whole tree and returns everything that is wrong, sorted by path and line.
pub fn check(files: &[File], exceptions: &[Exception]) -> Vec<Violation> {
    let mut found = Vec::new();
    for file in files {
        let report = &mut Report { path: &file.path, found: &mut found };
        check_place(file, report);
        if is_text(file) {
            check_text(file, &String::from_utf8_lossy(&file.bytes), report);
        }
    }
    for broken in markdown::broken_links(files) {
        let report = &mut Report { path: &broken.path, found: &mut found };
        report.add(
            broken.line,
            Rule::Link,
            format!("the link target {} is not there", broken.target),
        );
    }
    let mut used = BTreeSet::new();
    found.retain(|v| {
        let excused = exceptions.iter().position(|e| e.path == v.path && e.rule == v.rule);
        used.extend(excused);
        excused.is_none()
    });
    for (i, exception) in exceptions.iter().enumerate().filter(|(i, _)| !used.contains(i)) {
        let report = &mut Report { path: exception.path, found: &mut found };
        let what = format!("nothing to excuse as {:?} ({})", exception.rule, exception.reason);
        report.add(i, Rule::UnusedException, what);
    }
    found.sort();
    found
}

fn is_text(file: &File) -> bool {
    let name = file.path.rsplit('/').next().unwrap_or_default();
    TEXT_ENDINGS.iter().any(|ending| name.ends_with(ending))
        || matches!(name, "Makefile" | ".gitignore" | ".gitattributes")
        || file.bytes.starts_with(b"#!")
}

/// Tests may be long: a story per promise reads better in one piece.
fn is_test(path: &str) -> bool {
    let name = path.rsplit('/').next().unwrap_or_default();
    path.split('/').rev().skip(1).any(|dir| dir == "tests") || name.ends_with("tests.rs")
}

fn check_place(file: &File, report: &mut Report) {
    let top = file.path.split('/').next().unwrap_or_default();
    if !top.starts_with('.') && !TOP_LEVEL.contains(&top) {
        report.add(0, Rule::TopLevel, format!("{top} is not one of the fixed top-level entries"));
    }
    if file.bytes.len() > FILE_BYTES_MAX {
        let what = format!("{} bytes, at most {FILE_BYTES_MAX}", file.bytes.len());
        report.add(0, Rule::FileSize, what);
    }
    if file.bytes.starts_with(b"#!/") != file.executable {
        report.add(0, Rule::Executable, "scripts start with #! and are executable, others neither");
    }
}

fn check_text(file: &File, text: &str, report: &mut Report) {
    check_characters(file, text, report);
    if file.path.ends_with(".rs") {
        let source = Source::parse(text);
        check_source(file, &source, report);
        for (line, comment) in source.comments.iter().enumerate() {
            check_unfinished(line, comment, report);
        }
    } else {
        for (line, content) in text.lines().enumerate() {
            check_unfinished(line, content, report);
        }
    }
}

fn check_characters(file: &File, text: &str, report: &mut Report) {
    let tabs_allowed = file.path.ends_with("Makefile");
    for (line, content) in text.split('\n').enumerate() {
        if content.contains('\t') && !tabs_allowed {
            report.add(line, Rule::Tab, "a tab");
        }
        if content.ends_with([' ', '\t']) {
            report.add(line, Rule::TrailingSpace, "white space at the end of the line");
        }
        if content.chars().any(|c| c != '\t' && is_control(c)) {
            report.add(line, Rule::ControlCharacter, "a control or text-direction character");
        }
    }
    let ends_well = text.is_empty() || (text.ends_with('\n') && !text.ends_with("\n\n"));
    if !ends_well {
        report.add(text.lines().count().max(1) - 1, Rule::FinalNewline, "ends in one newline");
    }
}

/// Control characters, the replacement of bytes that are not UTF-8, the byte order mark, and the
/// characters that make text look different from what the compiler reads.
fn is_control(c: char) -> bool {
    let reordering = matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}')
        || matches!(c, '\u{2066}'..='\u{2069}');
    c.is_control() || reordering || matches!(c, '\u{fffd}' | '\u{feff}')
}

fn check_unfinished(line: usize, text: &str, report: &mut Report) {
    let words = text.split(|c: char| !c.is_alphanumeric());
    let marked = words.into_iter().any(|w| matches!(w, "TODO" | "FIXME" | "XXX"));
    let names_issue = text
        .match_indices('#')
        .any(|(i, _)| text[i + 1..].starts_with(|c: char| c.is_ascii_digit()));
    if marked && !names_issue {
        report.add(line, Rule::Unfinished, "an unfinished-work mark without an issue number (#n)");
    }
}

fn check_source(file: &File, source: &Source, report: &mut Report) {
    let tokens = source.tokens();
    for (line, content) in source.raw.iter().enumerate() {
        let columns = content.chars().count();
        if columns > COLUMNS_MAX {
            let what = format!("{columns} columns, at most {COLUMNS_MAX}");
            report.add(line, Rule::Columns, what);
        }
    }
    let is_test = is_test(&file.path);
    check_length(source, &tokens, is_test, report);
    if !is_test && !source.comments.first().is_some_and(|c| c.starts_with("//!")) {
        report.add(0, Rule::FileHead, "a source file starts with //! and its invariants");
    }
    check_functions(&tokens, report);
    check_words(source, &tokens, report);
}

fn check_length(source: &Source, tokens: &[Token], is_test: bool, report: &mut Report) {
    let all = source.raw.len();
    let without_tests = if is_test { 0 } else { all - scan::test_module_lines(tokens) };
    if without_tests > FILE_LINES_MAX {
        let what = format!("{without_tests} lines without tests, at most {FILE_LINES_MAX}");
        report.add(0, Rule::FileLength, what);
    } else if all > FILE_LINES_HARD_MAX {
        let what = format!("{all} lines with tests, at most {FILE_LINES_HARD_MAX}");
        report.add(0, Rule::FileLength, what);
    }
}

fn check_functions(tokens: &[Token], report: &mut Report) {
    for f in scan::functions(tokens) {
        if f.lines > FUNCTION_LINES_MAX {
            let what = format!("{} has {} lines, at most {FUNCTION_LINES_MAX}", f.name, f.lines);
            report.add(f.line, Rule::FunctionLength, what);
        }
        if f.parameters > PARAMETERS_MAX {
            let what = format!("{} takes {}, at most {PARAMETERS_MAX}", f.name, f.parameters);
            report.add(f.line, Rule::Parameters, what);
        }
    }
}

fn check_words(source: &Source, tokens: &[Token], report: &mut Report) {
    let text = |i: usize| tokens.get(i).map_or("", |t| t.text.as_str());
    for (i, token) in tokens.iter().enumerate() {
        match (token.text.as_str(), text(i + 1), text(i + 2)) {
            (name @ ("todo" | "unimplemented" | "dbg"), "!", "(" | "[" | "{") => {
                report.add(token.line, Rule::Placeholder, format!("{name}!"));
            }
            ("#", "[", "ignore") if text(i + 3) == "]" => {
                report.add(token.line, Rule::IgnoredTest, "#[ignore] without a reason");
            }
            ("unsafe", "{" | "impl", _) if !has_safety_note(source, token.line) => {
                report.add(token.line, Rule::SafetyNote, "unsafe without a SAFETY comment");
            }
            _ => {}
        }
    }
}

/// Whether a SAFETY comment stands on `line`, or above it: past any number of comment lines and up
/// to five lines of the same statement, not past a blank line.
fn has_safety_note(source: &Source, line: usize) -> bool {
    let mut code_lines_left = 5;
    for i in (0..=line).rev() {
        if source.comments[i].contains("SAFETY:") {
            return true;
        }
        if source.code[i].trim().is_empty() {
            if source.raw[i].trim().is_empty() {
                return false;
            }
        } else if code_lines_left == 0 {
            return false;
        } else {
            code_lines_left -= 1;
        }
    }
    false
}

/// The directory part of a path in the tree, empty at the top.
pub fn directory(path: &str) -> &str {
    Path::new(path).parent().and_then(Path::to_str).unwrap_or_default()
}
