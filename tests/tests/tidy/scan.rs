//! Knows just enough Rust to tell code, comments and literals apart.
//!
//! Invariants: `raw`, `code` and `comments` have the same number of lines, and a character keeps
//! its line and column in whichever of the two masks it belongs to (the other has a space there).
//! The content of string and character literals is in neither mask; their quotes count as code.

/// A source file taken apart.
pub struct Source {
    /// The lines as they are.
    pub raw: Vec<String>,
    /// Only code.
    pub code: Vec<String>,
    /// Only comments, with their markers.
    pub comments: Vec<String>,
}

/// A word or a single punctuation character of the code, with its line (from 0).
pub struct Token {
    pub line: usize,
    pub text: String,
}

/// A function with a body: where it starts (line from 0), how long and how wide it is.
pub struct Function {
    pub name: String,
    pub line: usize,
    /// From the line of `fn` to the line of the closing brace, both counted.
    pub lines: usize,
    pub parameters: usize,
}

enum Mask {
    Code,
    Comment,
    Neither,
}

struct Scanner {
    text: Vec<char>,
    at: usize,
    code: String,
    comments: String,
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

impl Scanner {
    fn peek(&self, ahead: usize) -> Option<char> {
        self.text.get(self.at + ahead).copied()
    }

    fn starts_with(&self, s: &str) -> bool {
        s.chars().enumerate().all(|(i, c)| self.peek(i) == Some(c))
    }

    fn take(&mut self, count: usize, mask: &Mask) {
        for _ in 0..count {
            let Some(c) = self.peek(0) else { return };
            self.at += 1;
            let (in_code, in_comments) = match (c, mask) {
                ('\n', _) => ('\n', '\n'),
                (_, Mask::Code) => (c, ' '),
                (_, Mask::Comment) => (' ', c),
                (_, Mask::Neither) => (' ', ' '),
            };
            self.code.push(in_code);
            self.comments.push(in_comments);
        }
    }

    fn take_line_comment(&mut self) {
        while self.peek(0).is_some_and(|c| c != '\n') {
            self.take(1, &Mask::Comment);
        }
    }

    fn take_block_comment(&mut self) {
        let mut depth = 0;
        while self.peek(0).is_some() {
            if self.starts_with("/*") {
                depth += 1;
                self.take(2, &Mask::Comment);
            } else if self.starts_with("*/") {
                depth -= 1;
                self.take(2, &Mask::Comment);
                if depth == 0 {
                    return;
                }
            } else {
                self.take(1, &Mask::Comment);
            }
        }
    }

    /// A literal between two `quote`s, with backslash escapes.
    fn take_quoted(&mut self, quote: char) {
        self.take(1, &Mask::Code);
        while let Some(c) = self.peek(0) {
            if c == quote {
                return self.take(1, &Mask::Code);
            }
            self.take(if c == '\\' { 2 } else { 1 }, &Mask::Neither);
        }
    }

    /// `#…#"…"#…#`, after its prefix; false (and nothing taken) when it is none.
    fn take_raw_string(&mut self) -> bool {
        let hashes = (0..).take_while(|&i| self.peek(i) == Some('#')).count();
        if self.peek(hashes) != Some('"') {
            return false;
        }
        self.take(hashes + 1, &Mask::Code);
        let end = format!("\"{}", "#".repeat(hashes));
        while self.peek(0).is_some() && !self.starts_with(&end) {
            self.take(1, &Mask::Neither);
        }
        self.take(end.len(), &Mask::Code);
        true
    }

    fn take_word(&mut self) {
        let length = (0..).take_while(|&i| self.peek(i).is_some_and(is_word)).count();
        let word: String = self.text[self.at..self.at + length].iter().collect();
        self.take(length, &Mask::Code);
        if matches!(word.as_str(), "r" | "br" | "cr") {
            self.take_raw_string();
        }
    }

    /// A quote opens a character literal (`'x'`, `'\n'`) or a lifetime (`'a`).
    fn take_tick(&mut self) {
        if self.peek(1) == Some('\\') || self.peek(2) == Some('\'') {
            self.take_quoted('\'');
        } else {
            self.take(1, &Mask::Code);
        }
    }

    fn run(&mut self) {
        while let Some(c) = self.peek(0) {
            match c {
                '/' if self.peek(1) == Some('/') => self.take_line_comment(),
                '/' if self.peek(1) == Some('*') => self.take_block_comment(),
                '"' => self.take_quoted('"'),
                '\'' => self.take_tick(),
                c if is_word(c) => self.take_word(),
                _ => self.take(1, &Mask::Code),
            }
        }
    }
}

fn lines(text: &str) -> Vec<String> {
    text.lines().map(str::to_owned).collect()
}

impl Source {
    /// Takes `text` apart.
    pub fn parse(text: &str) -> Self {
        let mut scanner = Scanner {
            text: text.chars().collect(),
            at: 0,
            code: String::new(),
            comments: String::new(),
        };
        scanner.run();
        Source { raw: lines(text), code: lines(&scanner.code), comments: lines(&scanner.comments) }
    }

    /// The words and punctuation of the code, in order.
    pub fn tokens(&self) -> Vec<Token> {
        let mut tokens: Vec<Token> = Vec::new();
        for (line, code) in self.code.iter().enumerate() {
            let mut inside_word = false;
            for c in code.chars() {
                match tokens.last_mut() {
                    Some(word) if inside_word && is_word(c) => word.text.push(c),
                    _ if c.is_whitespace() => {}
                    _ => tokens.push(Token { line, text: c.to_string() }),
                }
                inside_word = is_word(c);
            }
        }
        tokens
    }
}

/// The index just behind the bracket that closes the one at `open`, or the end.
fn behind_group(tokens: &[Token], open: usize) -> usize {
    let mut depth = 0;
    for (i, token) in tokens.iter().enumerate().skip(open) {
        match token.text.as_str() {
            "(" | "[" | "{" => depth += 1,
            ")" | "]" | "}" => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return i + 1;
        }
    }
    tokens.len()
}

fn text_at(tokens: &[Token], i: usize) -> &str {
    tokens.get(i).map_or("", |t| t.text.as_str())
}

/// The index just behind the generic parameters that start at `open`, if they do.
fn behind_generics(tokens: &[Token], open: usize) -> usize {
    let mut depth = 0;
    let mut i = open;
    while i < tokens.len() {
        match text_at(tokens, i) {
            "<" => depth += 1,
            ">" if text_at(tokens, i - 1) != "-" => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return if i == open { i } else { i + 1 };
        }
        i += 1;
    }
    i
}

/// How many parameters stand between the parentheses `open` and `close`.
fn count_parameters(tokens: &[Token], open: usize, close: usize) -> usize {
    let (mut angles, mut count, mut pending) = (0, 0, false);
    let mut i = open + 1;
    while i < close {
        let text = text_at(tokens, i);
        if text == "," && angles == 0 {
            pending = false;
        } else {
            count += usize::from(!pending);
            pending = true;
        }
        match text {
            "<" => angles += 1,
            ">" if text_at(tokens, i - 1) != "-" => angles -= 1,
            _ => {}
        }
        i = if matches!(text, "(" | "[" | "{") { behind_group(tokens, i) } else { i + 1 };
    }
    count
}

/// Every function with a body. Function pointers and declarations without body are left out.
pub fn functions(tokens: &[Token]) -> Vec<Function> {
    let mut found = Vec::new();
    for (i, token) in tokens.iter().enumerate() {
        let name = text_at(tokens, i + 1);
        if token.text != "fn" || !name.starts_with(is_word) {
            continue;
        }
        let open = behind_generics(tokens, i + 2);
        if text_at(tokens, open) != "(" {
            continue;
        }
        let behind_parameters = behind_group(tokens, open);
        let mut body = behind_parameters;
        while !matches!(text_at(tokens, body), "{" | ";" | "") {
            let group = matches!(text_at(tokens, body), "(" | "[");
            body = if group { behind_group(tokens, body) } else { body + 1 };
        }
        if text_at(tokens, body) != "{" {
            continue;
        }
        let last = &tokens[behind_group(tokens, body) - 1];
        found.push(Function {
            name: name.to_owned(),
            line: token.line,
            lines: last.line - token.line + 1,
            parameters: count_parameters(tokens, open, behind_parameters - 1),
        });
    }
    found
}

/// How many lines belong to modules compiled for unit tests only.
pub fn test_module_lines(tokens: &[Token]) -> usize {
    let mut lines = 0;
    let mut i = 0;
    while i < tokens.len() {
        let attribute: String =
            tokens[i..].iter().take(6).map(|t| t.text.as_str()).collect::<String>();
        if !attribute.starts_with("#[cfg(test") && !attribute.starts_with("#[cfg(all(test") {
            i += 1;
            continue;
        }
        let first = tokens[i].line;
        let mut item = i;
        while text_at(tokens, item) == "#" {
            item = behind_group(tokens, item + 1);
        }
        if text_at(tokens, item) == "pub" {
            let scoped = text_at(tokens, item + 1) == "(";
            item = if scoped { behind_group(tokens, item + 1) } else { item + 1 };
        }
        i = item;
        if text_at(tokens, item) == "mod" && text_at(tokens, item + 2) == "{" {
            i = behind_group(tokens, item + 2);
            lines += tokens[i - 1].line - first + 1;
        }
    }
    lines
}
