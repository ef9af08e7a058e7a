//! For each rule something that breaks it and something close to it that does not.

use std::collections::BTreeSet;

use crate::rules::{Exception, File, Rule, Violation, check};

struct Sample {
    rule: Rule,
    path: &'static str,
    bad: Vec<String>,
    good: Vec<String>,
}

fn sample(rule: Rule, path: &'static str, bad: &[&str], good: &[&str]) -> Sample {
    let owned = |texts: &[&str]| texts.iter().map(|&t| t.to_owned()).collect();
    Sample { rule, path, bad: owned(bad), good: owned(good) }
}

fn file(path: &str, text: &str) -> File {
    let executable = text.starts_with("#!/");
    File { path: path.to_owned(), bytes: text.as_bytes().to_owned(), executable }
}

fn function(lines: usize) -> String {
    format!("fn f() -> [u8; 4] {{\n{}}}\n", "    g();\n".repeat(lines - 2))
}

fn source(lines: usize, test_lines: usize) -> String {
    let tests = if test_lines == 0 {
        String::new()
    } else {
        let body = "    use x;\n".repeat(test_lines - 3);
        format!("#[cfg(test)]\nmod tests {{\n{body}}}\n")
    };
    format!("//! Head.\n{}{tests}", "use x;\n".repeat(lines - 1))
}

fn samples_of_text() -> Vec<Sample> {
    vec![
        sample(Rule::Tab, "docs/a.md", &["a\tb\n", "\ta\n"], &["a b\n"]),
        sample(Rule::Tab, "benches/a.sh", &["if x\n\ty\n"], &["if x\n  y\n"]),
        sample(Rule::TrailingSpace, "docs/a.md", &["a \n", "a\n \nb\n"], &["a\n\nb\n"]),
        sample(
            Rule::ControlCharacter,
            "tools/src/a.rs",
            &["//! a\u{1b}\n", "//! a\r\n", "//! \u{202e}a\n", "//! a\u{feff}\n"],
            &["//! ä – µ\n"],
        ),
        sample(Rule::FinalNewline, "docs/a.md", &["a", "a\n\n"], &["a\n", ""]),
        sample(
            Rule::Unfinished,
            "tests/tests/a.rs",
            &["// TODO: later\n", "/* a\n FIXME */\n", "fn a() {} // XXX\n"],
            &["// TODO(#12): later\n", "// FIXME #3\n", "f(\"TODO\", XXX);\n", "// TODOS\n"],
        ),
        sample(Rule::Unfinished, "tools/a.sh", &["# TODO\n"], &["mktemp a.XXXXXX\n"]),
        sample(
            Rule::Link,
            "docs/a.md",
            &[
                "[a](b.md)\n",
                "![a](/README.md)\n",
                "[a](../../x)\n",
                "see\n\n[a]: nothing.md\n",
                "[a](#nowhere)\n# Some where\n",
                "`code` [a](b.md \"title\")\n",
            ],
            &[
                "[a](a.md) [b](../docs) [c](https://x.org/y) [d](mailto:a@b)\n",
                "# Some, where\n## Twice\n## Twice\n[a](#some-where) [b](a.md#twice-1)\n",
                "`[a](b.md)`\n```\n[a](b.md)\n```\n",
                "[a]: a.md\n[b]: <../docs/a.md>\n",
            ],
        ),
    ]
}

fn samples_of_place() -> Vec<Sample> {
    let script = "#!/bin/sh\ntrue\n";
    let large = "x".repeat((1 << 20) + 1);
    vec![
        sample(Rule::TopLevel, "notes/a.md", &["a\n"], &[]),
        sample(Rule::TopLevel, "notes.md", &["a\n"], &[]),
        sample(Rule::TopLevel, "docs/notes.md", &[], &["a\n"]),
        sample(Rule::TopLevel, ".ci/run", &[], &[script]),
        sample(Rule::FileSize, "tests/fixtures/a.bin", &[&large], &[&large[1..]]),
    ]
}

fn samples_of_source() -> Vec<Sample> {
    let wide = |columns: usize| format!("//! {}\n", "ä".repeat(columns - 4));
    let lengths = |sizes: &[(usize, usize)]| sizes.iter().map(|&(a, b)| source(a, b)).collect();
    vec![
        Sample {
            rule: Rule::Columns,
            path: "format/src/a.rs",
            bad: vec![wide(101)],
            good: vec![wide(100)],
        },
        Sample {
            rule: Rule::FileLength,
            path: "format/src/a.rs",
            bad: lengths(&[(501, 0), (501, 20), (400, 301)]),
            good: lengths(&[(500, 0), (500, 200)]),
        },
        Sample {
            rule: Rule::FileLength,
            path: "format/src/a.rs",
            bad: vec![source(400, 150).replace("cfg(test)", "cfg(unix)")],
            good: vec![source(400, 150).replace("mod tests", "pub(crate) mod tests")],
        },
        Sample {
            rule: Rule::FileLength,
            path: "blockd/tests/a.rs",
            bad: lengths(&[(701, 0)]),
            good: lengths(&[(700, 0)]),
        },
        Sample {
            rule: Rule::FunctionLength,
            path: "tests/tests/a.rs",
            bad: vec![
                function(71),
                format!("fn f() {{\nlet a = '{{'; // }}\n{}}}\n", "g();\n".repeat(69)),
            ],
            good: vec![
                function(70),
                format!("fn f() {{ g(\"{{\", '{{', r#\"{{\"#) }}\n{}", "use x;\n".repeat(70)),
                format!("fn f();\nmod a {{\n{}}}\n", "use x;\n".repeat(70)),
            ],
        },
        sample(
            Rule::Parameters,
            "tests/tests/a.rs",
            &[
                "fn f(&self, a: A, b: B, c: C, d: D, e: E, f: F) {}\n",
                "fn f(a in 0..(1 << 4), b: B, c: C, d: D, e: E, f: F, g: G) {}\n",
                "fn f<T: Fn(u8) -> u8>(a: A, b: B, c: C, d: D, e: E, f: F, g: T) {}\n",
            ],
            &[
                "fn f(&self, a: A, b: B, c: C, d: D, e: E) {}\n",
                "fn f(a: (A, B, C), d: Map<D, E>, f: impl Fn(G, H) -> I, j: [J; 2],) {}\n",
            ],
        ),
        sample(
            Rule::FileHead,
            "format/src/a.rs",
            &["use x;\n", "// not a doc comment\n", "/// of an item\nfn f() {}\n"],
            &["//! Head.\n"],
        ),
        sample(Rule::FileHead, "blockd/tests/a.rs", &[], &["use x;\n"]),
    ]
}

fn samples_of_words() -> Vec<Sample> {
    vec![
        sample(
            Rule::Placeholder,
            "tests/tests/a.rs",
            &[
                "fn f() { todo!() }\n",
                "fn f() { unimplemented!(\"x\") }\n",
                "fn f<'a>(x: &'a str) { dbg!(x) }\n",
            ],
            &["// todo!()\n", "fn f() { g(\"todo!()\", todo, '\"', \"dbg!(\") }\n"],
        ),
        sample(
            Rule::IgnoredTest,
            "tests/tests/a.rs",
            &["#[ignore]\n", "# [ ignore ]\n"],
            &["#[ignore = \"needs two hosts\"]\n", "// #[ignore]\n"],
        ),
        sample(
            Rule::SafetyNote,
            "tests/tests/a.rs",
            &[
                "fn f() { unsafe { g() } }\n",
                "// SAFETY: far above.\n\nunsafe impl Send for A {}\n",
                "// SAFETY: another statement.\na();\nb();\nc();\nd();\ne();\nf();\nunsafe {}\n",
                "fn f() { g(\"SAFETY:\"); unsafe { g() } }\n",
            ],
            &[
                "// SAFETY: the pointer is valid.\nunsafe { g() }\n",
                "// SAFETY: a\n//\n// long\n// story\n// about\n// it\n// all\nunsafe impl A {}\n",
                "// SAFETY: x.\nlet a = f(\n    1,\n    unsafe { g() },\n);\n",
                "/// Clippy asks for a Safety section where callers need one.\nunsafe fn f() {}\n",
                "type F = unsafe fn(u8);\n#[unsafe(no_mangle)]\nextern fn unsafe_name() {}\n",
            ],
        ),
    ]
}

fn all_samples() -> Vec<Sample> {
    let mut samples = samples_of_text();
    samples.extend(samples_of_place());
    samples.extend(samples_of_source());
    samples.extend(samples_of_words());
    samples
}

fn rules_of(violations: &[Violation]) -> BTreeSet<Rule> {
    violations.iter().map(|v| v.rule).collect()
}

#[test]
fn each_rule_fires_on_its_bad_sample_alone() {
    for sample in all_samples() {
        for text in &sample.bad {
            let found = check(&[file(sample.path, text)], &[]);

            let expected = BTreeSet::from([sample.rule]);
            assert_eq!(rules_of(&found), expected, "{}: {text:.60?}", sample.path);
        }
    }
}

#[test]
fn good_samples_pass() {
    for sample in all_samples() {
        for text in &sample.good {
            let found = check(&[file(sample.path, text)], &[]);

            assert!(found.is_empty(), "{found:?} in {text:.200?}");
        }
    }
}

#[test]
fn scripts_are_executable_and_nothing_else_is() {
    let script = |text: &str, executable| File { executable, ..file("tools/a.sh", text) };
    let rules = |f: File| rules_of(&check(&[f], &[]));

    assert_eq!(rules(script("#!/bin/sh\n", false)), BTreeSet::from([Rule::Executable]));
    assert_eq!(rules(script("true\n", true)), BTreeSet::from([Rule::Executable]));
    assert!(rules(script("#!/bin/sh\n", true)).is_empty());
    assert!(rules(script("true\n", false)).is_empty());
}

#[test]
fn exceptions_excuse_one_rule_in_one_file_and_must_be_needed() {
    let exception = |path| [Exception { path, rule: Rule::Tab, reason: "a table of a tool" }];
    let tree = [file("docs/a.md", "a\tb \n"), file("docs/b.md", "a\tb\n")];

    let excused = check(&tree, &exception("docs/a.md"));
    let unneeded = check(&[file("docs/a.md", "a\n")], &exception("docs/a.md"));

    let left: Vec<_> = excused.iter().map(|v| (v.path.as_str(), v.rule)).collect();
    assert_eq!(left, [("docs/a.md", Rule::TrailingSpace), ("docs/b.md", Rule::Tab)]);
    assert_eq!(rules_of(&unneeded), BTreeSet::from([Rule::UnusedException]));
}

#[test]
fn everything_wrong_is_reported_at_once_with_its_line() {
    let tree = [
        file("format/src/a.rs", "//! Head.\nfn f() { todo!() } \n// TODO\n"),
        file("notes.md", "[a](b.md)\n"),
    ];

    let found: Vec<String> = check(&tree, &[]).iter().map(ToString::to_string).collect();

    let places: Vec<String> =
        found.iter().map(|v| v.split(": ").take(2).collect::<Vec<_>>().join(": ")).collect();
    assert_eq!(
        places,
        [
            "format/src/a.rs:2: Placeholder",
            "format/src/a.rs:2: TrailingSpace",
            "format/src/a.rs:3: Unfinished",
            "notes.md:1: Link",
            "notes.md:1: TopLevel",
        ]
    );
}

#[test]
fn every_rule_has_a_sample_that_breaks_it() {
    let mut shown: BTreeSet<Rule> =
        all_samples().iter().filter(|s| !s.bad.is_empty()).map(|s| s.rule).collect();
    // These two need more than a text; each has a test of its own above.
    shown.extend([Rule::Executable, Rule::UnusedException]);

    assert_eq!(shown, BTreeSet::from(Rule::ALL));
}
