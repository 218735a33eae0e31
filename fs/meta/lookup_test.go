package meta

import (
	"slices"
	"testing"

	"lazuli/fs/toc"
)

func TestLookup(t *testing.T) {
	tree, err := Merge([]*toc.TOC{
		layerOf(t, "bin -> usr/bin", "usr/bin/", "usr/bin/sh =old", "usr/lib/x =x", "gone =g", "dir/", "dir/below =b", "loop -> loop2", "loop2 -> loop", "hard == usr/lib/x"),
		layerOf(t, "usr/bin/sh =newer 0755", "up -> ../../../usr/./bin/sh", "abs -> /up", ".wh.gone", "dir/.wh..wh..opq", "dir/above", "deep/l -> ../usr", "out -> /../nowhere"),
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		name, real   string
		typ          toc.Type
		size         int64
		layer, entry int
	}{
		{"usr/bin/sh", "usr/bin/sh", toc.Regular, 5, 1, 0},
		{"/bin//sh", "usr/bin/sh", toc.Regular, 5, 1, 0},
		{"../abs", "usr/bin/sh", toc.Regular, 5, 1, 0},
		{"deep/l/lib/x", "usr/lib/x", toc.Regular, 1, 0, 3},
		{"hard", "hard", toc.Regular, 1, 0, 3},
		{"dir/above", "dir/above", toc.Regular, 0, 1, 5},
		{"deep/l", "usr", toc.Directory, 0, 0, 0},
		{"", "", toc.Directory, 0, 0, 0},
	} {
		f, ok := tree.Lookup(test.name)
		if !ok || f.Name != test.real || f.Type != test.typ || f.Size != test.size || f.Layer != test.layer || f.Entry != test.entry && f.Type == toc.Regular {
			t.Errorf("%s is %+v, %v", test.name, f, ok)
		}
	}
	for _, name := range []string{"gone", "dir/below", "loop", "out", "usr/bin/sh/x", "usr/bi", ".", "dir/.."} {
		if f, ok := tree.Lookup(name); ok && f.Name != "" {
			t.Errorf("%s is %+v", name, f)
		}
	}
	if f, _ := tree.Lookup("usr/bin/sh"); f.Mode != 0o755 {
		t.Errorf("mode %o", f.Mode)
	}
	if got := tree.List("bin/../usr"); !slices.Equal(got, []string{"bin", "lib"}) {
		t.Errorf("names %q", got)
	}
	if got := tree.List("dir"); !slices.Equal(got, []string{"above"}) {
		t.Errorf("names %q", got)
	}
	if got := tree.List("hard"); got != nil {
		t.Errorf("names %q", got)
	}
}
