package closure

import (
	"bytes"
	"strings"
)

const (
	maxTokens  = 1 << 14 // of a logical line
	maxImports = 1 << 12 // names that one module imports
	maxName    = 255     // bytes of a module's name
)

// imports returns the names of the modules that Python source text imports while it is itself imported, or run if it is the main
// module, in their order: those of import statements that are not in a function, and of import_module("…") and __import__("…").
// A name begins with as many dots as the statement has, if it is relative. What is imported from a module may be one too:
// "from a import b" gives a and a.b.
//
// It looks at tokens, not at grammar: every branch of a condition and every handler counts, but for those that are
// for type checkers or for main modules alone.
func imports(text []byte, main bool) []string {
	s := scanner{text: bytes.TrimPrefix(text, []byte("\xef\xbb\xbf")), main: main, body: -1, seen: map[string]bool{}}
	for s.at < len(s.text) && len(s.names) < maxImports {
		if indent, ok := s.line(); ok {
			s.statement(indent)
		}
	}
	return s.names
}

// A token is a word (a name or a number), a string or one character of anything else.
type token struct {
	kind byte // 'w', 's' or the character
	text []byte
}

func (t token) is(word string) bool { return t.kind == 'w' && string(t.text) == word }

type scanner struct {
	text []byte
	at   int
	main bool

	tokens []token // of the last logical line
	body   int     // the indentation of a statement whose body is passed over; -1 is none
	names  []string
	seen   map[string]bool
}

// line reads a logical line, which ends at a newline outside of brackets and strings, and returns its indentation. It is not ok if there is
// nothing on it.
func (s *scanner) line() (indent int, ok bool) {
	s.tokens = s.tokens[:0]
	for ; s.at < len(s.text); s.at++ {
		switch s.text[s.at] {
		case ' ':
			indent++
			continue
		case '\t':
			indent = indent/8*8 + 8
			continue
		case '\f':
			indent = 0
			continue
		}
		break
	}
	depth := 0
	for s.at < len(s.text) {
		c := s.text[s.at]
		switch {
		case c == '\n':
			s.at++
			if depth == 0 {
				return indent, len(s.tokens) > 0
			}
		case c == '\\' && s.at+1 < len(s.text): // before a newline; elsewhere it is no Python
			s.at++
			if s.text[s.at] == '\r' && s.at+1 < len(s.text) {
				s.at++
			}
			s.at++
		case c == '#':
			if n := bytes.IndexByte(s.text[s.at:], '\n'); n >= 0 {
				s.at += n
			} else {
				s.at = len(s.text)
			}
		case c == '"' || c == '\'':
			s.add('s', s.quoted(c))
		case isWord(c):
			from := s.at
			for s.at < len(s.text) && isWord(s.text[s.at]) {
				s.at++
			}
			s.add('w', s.text[from:s.at])
		case c == ' ' || c == '\t' || c == '\r' || c == '\f':
			s.at++
		default:
			switch c {
			case '(', '[', '{':
				depth++
			case ')', ']', '}':
				depth = max(depth-1, 0)
			}
			s.at++
			s.add(c, nil)
		}
	}
	return indent, len(s.tokens) > 0
}

func (s *scanner) add(kind byte, text []byte) {
	if len(s.tokens) < maxTokens {
		s.tokens = append(s.tokens, token{kind, text[:min(len(text), maxName+1)]})
	}
}

func isWord(c byte) bool {
	return c == '_' || c >= 0x80 || '0' <= c && c <= '9' || 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z'
}

// quoted reads a string that begins with a quote, and returns what is between its quotes.
func (s *scanner) quoted(quote byte) []byte {
	end := []byte{quote}
	if triple := bytes.Repeat(end, 3); bytes.HasPrefix(s.text[s.at:], triple) {
		end = triple
	}
	s.at += len(end)
	from := s.at
	for s.at < len(s.text) {
		switch c := s.text[s.at]; {
		case c == '\\':
			s.at = min(s.at+2, len(s.text))
		case c == '\n' && len(end) == 1: // it is no Python; the next line may be
			return s.text[from:s.at]
		case c == quote && bytes.HasPrefix(s.text[s.at:], end):
			s.at += len(end)
			return s.text[from : s.at-len(end)]
		default:
			s.at++
		}
	}
	return s.text[from:]
}

// statement takes the names out of the last logical line.
func (s *scanner) statement(indent int) {
	if s.body >= 0 && indent > s.body {
		return
	}
	s.body = -1
	t := s.tokens
	if t[0].is("async") && len(t) > 1 {
		t = t[1:]
	}
	if t[0].is("def") {
		s.body = indent
		return
	}
	s.calls(t)
	if t[0].kind == 'w' && compound[string(t[0].text)] {
		colon := outside(t, ':')
		if colon < 0 {
			return
		}
		if s.never(t[1:colon]) {
			s.body = indent
			return
		}
		t = t[colon+1:]
	}
	for len(t) > 0 {
		end := outside(t, ';')
		if end < 0 {
			end = len(t)
		}
		s.simple(t[:end])
		t = t[min(end+1, len(t)):]
	}
}

// compound are the words that begin a statement with a body that runs when the module does.
var compound = map[string]bool{"if": true, "elif": true, "else": true, "try": true, "except": true, "finally": true, "with": true,
	"for": true, "while": true, "class": true}

// outside returns where a character is outside of brackets, or -1.
func outside(t []token, c byte) int {
	depth := 0
	for i, x := range t {
		switch x.kind {
		case '(', '[', '{':
			depth++
		case ')', ']', '}':
			depth--
		case c:
			if depth == 0 {
				return i
			}
		}
	}
	return -1
}

// never reports whether a condition is false whenever the module is run: that of type checkers, or being the main one.
func (s *scanner) never(t []token) bool {
	var text strings.Builder
	for _, x := range t {
		if x.kind != 'w' && x.kind != 's' {
			text.WriteByte(x.kind)
		}
		text.Write(x.text)
		if text.Len() > maxName {
			return false
		}
	}
	c := strings.Trim(text.String(), "()")
	switch c {
	case "__name__==__main__", "__main__==__name__":
		return !s.main
	case "TYPE_CHECKING", "False", "0":
		return true
	}
	module, name, _ := strings.Cut(c, ".")
	return name == "TYPE_CHECKING" && (module == "typing" || len(module) == 1)
}

// simple takes the names out of an import statement.
func (s *scanner) simple(t []token) {
	switch {
	case len(t) < 2:
	case t[0].is("import"):
		for t = t[1:]; len(t) > 0; {
			name, rest := dotted(t)
			if name == "" || name[0] == '.' {
				return
			}
			s.name(name)
			comma := outside(rest, ',')
			if comma < 0 {
				return
			}
			t = rest[comma+1:]
		}
	case t[0].is("from"):
		base, t := dotted(t[1:])
		if base == "" || len(t) == 0 || !t[0].is("import") {
			return
		}
		if strings.Trim(base, ".") != "" {
			s.name(base)
			base += "."
		}
		for word := true; len(s.names) < maxImports; word = t[0].kind == ',' || t[0].kind == '(' {
			if t = t[1:]; len(t) == 0 {
				return
			}
			if word && t[0].kind == 'w' {
				s.name(base + string(t[0].text))
			}
		}
	}
}

// dotted returns the dots and the name that tokens begin with, and the tokens behind them.
func dotted(t []token) (string, []token) {
	var name strings.Builder
	word := false // was the last
	for len(t) > 0 && name.Len() <= maxName && (t[0].kind == '.' || t[0].kind == 'w' && !word && !t[0].is("import")) {
		if word = t[0].kind == 'w'; word {
			name.Write(t[0].text)
		} else {
			name.WriteByte('.')
		}
		t = t[1:]
	}
	return name.String(), t
}

func (s *scanner) name(name string) {
	if len(name) <= maxName && !s.seen[name] && len(s.names) < maxImports {
		s.seen[name] = true
		s.names = append(s.names, name)
	}
}

// calls takes the names out of import_module("…") and __import__("…").
func (s *scanner) calls(t []token) {
	for i := 0; i+3 < len(t) && !t[i].is("lambda"); i++ {
		if (t[i].is("import_module") || t[i].is("__import__")) && t[i+1].kind == '(' && t[i+2].kind == 's' && (t[i+3].kind == ')' || t[i+3].kind == ',') {
			s.name(string(t[i+2].text))
		}
	}
}
