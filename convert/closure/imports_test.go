package closure

import (
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestImports(t *testing.T) {
	for _, test := range []struct {
		name, text string
		want       string // names, with spaces between
	}{
		{"import", "import a\nimport b.c as d, e\n", "a b.c e"},
		{"from", "from a.b import c, d as e\n", "a.b a.b.c a.b.d"},
		{"star", "from a import *\n", "a"},
		{"relative", "from . import a\nfrom .b import c\nfrom ..d import e\nfrom ... import f\n", ".a .b .b.c ..d ..d.e ...f"},
		{"in brackets", "from a import (b, # (c)\n    d as e,\n\n  f)\nimport g", "a a.b a.d a.f g"},
		{"continued", "from a \\\n  import b, \\\r\n c\nimport \\\nd\n", "a a.b a.c d"},
		{"semicolons", "import a; import b;\nx = 1; import c; y = (2; import d)\n", "a b c"},
		{"one line", "if x: import a; import b\ntry: import c\nexcept (A, B): import d\nelse: from e import f\n", "a b c d e e.f"},
		{"branches", "try:\n  import a\nexcept E:\n  import b\nfinally:\n\timport c\nif x[1:2]:\n    import d\nelif y:\n    import e\nelse:\n    with f as g:\n        for h in i:\n            while j:\n                import k\n",
			"a b c d e k"},
		{"functions", "def f():\n    import a\n\n    def g(): pass\n    import b\nimport c\nasync def h(x=\n1):\n  import d\n\n# nothing\nimport e\ndef i(): import f\nimport g", "c e g"},
		{"a class", "class A(B):\n    import a\n    def f(self):\n        import b\n    import c\n", "a c"},
		{"tabs", "class A:\n        def f(self):\n\t    import a\n\timport b\n", "b"},
		{"decorators", "@a.b('import c')\ndef f():\n    import d\n", ""},
		{"for type checkers", "if TYPE_CHECKING:\n    import a\nelse:\n    import b\nif typing.TYPE_CHECKING:\n  import c\nif t.TYPE_CHECKING: import d\nif (TYPE_CHECKING):\n  import e\nif not TYPE_CHECKING:\n    import f\nif False:\n    import g\n", "b f"},
		{"for the main module", "import a\nif __name__ == '__main__':\n    import b\nif \"__main__\" == __name__: import c\nif __name__ == 'x':\n    import d\n", "a d"},
		{"strings", "x = 'import a'\n'''\nimport b\n'''\ny = \"\"\"\nimport c\\\"\"\"\"\nimport d\nz = r'\\\\'; import e\nw = 'not closed\nimport f\nv = f'{g}' 'import h'\nb\"\"; import i\n", "d e f i"},
		{"a string in a bracket", "x = [')', \"]\", # ]\nimport_it]\nimport a\n", "a"},
		{"comments", "# import a\nimport b # import c\n#\\\nimport d", "b d"},
		{"a docstring", "'''It's\nimport a\n'''\nimport b\n", "b"},
		{"calls", "import importlib\nx = importlib.import_module('a.b')\ny = [__import__(\"c\"), import_module('.d', __name__), import_module(name), import_module(f'e')]\nz = lambda: import_module('f')\n", "importlib a.b c .d"},
		{"what is no import", "imports = 1\nfrom_ = import_\nx.import_ = a\nyield_from = b\nprint('x', import_module)\nfromage import a\n", ""},
		{"what is no Python", "import\nfrom\nfrom . x\nimport .\nfrom a b import c\nimport 'a'\nimport a b\n)))\nimport c\n", "a c"},
		{"a mark before", "\xef\xbb\xbfimport a\n", "a"},
		{"twice", "import a, a\nimport a\n", "a"},
		{"a long name", "import " + strings.Repeat("a", maxName+1) + ", b\n", "b"},
		{"an open bracket", "import a\nx = (\nimport b\n", "a"},
	} {
		t.Run(test.name, func(t *testing.T) {
			if diff := cmp.Diff(strings.Fields(test.want), imports([]byte(test.text), false), cmp.Transformer("", func(s []string) string { return strings.Join(s, " ") })); diff != "" {
				t.Errorf("names (-want +got):\n%s", diff)
			}
		})
	}
	if got := imports([]byte("if __name__ == '__main__':\n    import a\n"), true); !slices.Equal(got, []string{"a"}) {
		t.Errorf("the main module imports %q", got)
	}
	if got := imports([]byte("import "+strings.Repeat("a, b, ", maxTokens)+"\nimport c"), false); !slices.Equal(got, []string{"a", "b", "c"}) {
		t.Errorf("a long line imports %q", got)
	}
	var many strings.Builder
	for i := range 3 * maxImports {
		many.WriteString("import a" + strings.Repeat("b", i/100) + strings.Repeat("c", i%100) + "\n")
	}
	if got := imports([]byte(many.String()), false); len(got) > maxImports {
		t.Errorf("%d names", len(got))
	}
}

// FuzzImports: no panic, and no more than what is bounded.
func FuzzImports(f *testing.F) {
	f.Add("from .a import (b as c,\n d)\nif x: import e; f = '''\n'''\n")
	f.Add("if TYPE_CHECKING:\n\timport a\nelif __name__ == \"__main__\": __import__('b')\ndef f(): \\\r\n 1\nclass A: from ..b import *")
	f.Add("'\\")
	f.Add("import\\")
	f.Fuzz(func(t *testing.T, text string) {
		for _, main := range []bool{false, true} {
			got := imports([]byte(text), main)
			seen := map[string]bool{}
			for _, name := range got {
				if len(name) > maxName || seen[name] {
					t.Errorf("name %q, seen: %v", name, seen[name])
				}
				seen[name] = true
			}
		}
	})
}
