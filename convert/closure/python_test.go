package closure

import (
	"context"
	"fmt"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestPython(t *testing.T) {
	const ld = "/lib64/ld-linux-x86-64.so.2"
	image := memory{
		"lib64/ld-linux-x86-64.so.2": program("", nil), "usr/bin/python3": "-> usr/bin/python3.12", "usr/bin/python3.12": program(ld, nil),
		"usr/lib/python3.12/os.py": "import stat", "usr/lib/python3.12/encodings/__init__.py": "", "usr/lib/python3.12/stat.py": "import beside_stat",
		"usr/lib/python3.12/beside_stat.py": "pass", "usr/lib/python3.12/lib-dynload/_fast.cpython-312-x86_64-linux-gnu.so": program("", []string{"libfast.so"}),
		"usr/lib/libfast.so": program("", nil), "usr/lib/python3.12/shadowed.py": "stdlib", "usr/lib/python3.12/importlib/__init__.py": "pass",
		"usr/lib/python3.12/importlib/util.py": "import beside_util", "usr/lib/python3.12/beside_util.py": "pass", "usr/lib/python3.12/runpy.py": "import importlib.util",
		"usr/bin/python3.10": program(ld, nil), "usr/lib/python3.10/os.py": "import stat", "usr/lib/python3.10/stat.py": "pass", "usr/lib/python3.10/site.py": "import os",

		"app/main.py": "import one\nfrom two import three, four\nimport _fast\nimport shadowed, gone\nprint(1)\n",
		"app/one.py":  "import sys\nimport two.three\n", "app/two/__init__.py": "from . import five\n", "app/two/three.py": "from .five import x\nfrom .. import y\n",
		"app/two/five.py": "three = 3", "app/two/four.py": "4", "app/two/six.py": "6", "app/shadowed.py": "app",
		"app/__pycache__/one.cpython-312.pyc": "compiled", "app/__pycache__/two.cpython-312.pyc": "stale", "app/two/__pycache__/five.cpython-311.pyc": "another's",
		"app/linked.py": "-> srv/linked/main.py", "srv/linked/main.py": "import near", "srv/linked/near.py": "pass",
		"app/loop.py": "import loop_a", "app/loop_a.py": "import loop_b", "app/loop_b.py": "import loop_a, loop",
		"app/spaces.py": "import ns.a, ns.b, plain.c", "app/ns/a.py": "a", "opt/lib/ns/b.py": "b", "app/plain": "a file",
		"app/kinds.py": "import k1, k2, k3, k4, k5, k6", "app/k1.so": "1", "app/k1.py": "1", "app/k2.abi3.so": "2", "app/k2.so": "2",
		"app/k3.cpython-312-x86_64-linux-gnu.so": "3", "app/k3.abi3.so": "3", "app/k4.cpython-311-x86_64-linux-gnu.so": "4", "app/k5.pyc": "5",
		"app/k6/__init__.cpython-312-x86_64-linux-gnu.so": "6",
		"app/c.py": "import cy.fast", "app/cy/__init__.py": "pass", "app/cy/fast.so": "\x00cy.other\x00_near\x00stat\x00cy.not a name\x00", "app/cy/other.py": "pass",
		"app/cy/_near.py": "pass", "app/cy/stat.py": "pass", "app/cy/not.py": "pass",
		"app/up.py": "import up1.up2.up3", "app/up1/__init__.py": "pass", "app/up1/up2/__init__.py": "pass", "app/up1/up2/up3.py": "from .. import a\nfrom ..b import x\nfrom ... import one\nfrom .... import one",
		"app/up1/a.py": "pass", "app/up1/b.py": "pass",
		"app/prog/__main__.py": "from . import near\nimport helps", "app/prog/helps.py": "pass", "app/prog/near.py": "pass",
		"app/mods/__init__.py": "import one", "app/mods/run.py": "from . import near\nif __name__ == '__main__': import two.six", "app/mods/near.py": "pass",

		"usr/lib/python3/dist-packages/deb.py": "pass", "usr/local/lib/python3.12/dist-packages/local.py": "pass", "usr/lib/python3.12/site-packages/pip.py": "pass",
		"usr/local/lib/python3.12/dist-packages/x.pth": "# ../none\n/srv/added\n../relative\nimport os; os.a(); __import__('stated')\n", "srv/added/added.py": "pass",
		"usr/local/lib/python3.12/dist-packages/stated.py": "pass", "usr/local/lib/python3.12/relative/rel.py": "pass", "usr/lib/python3.12/sitecustomize.py": "import custom",
		"usr/lib/python3.12/custom.py": "pass", "root/.local/lib/python3.12/site-packages/user.py": "pass", "app/sites.py": "import deb, local, pip, added, rel, user, robot",
		"opt/ros/noetic/lib/python3/dist-packages/robot.py": "pass", "opt/ros/noetic/bin/roscmd": "#!/usr/bin/python3\nimport robot\n",
		"venv/bin/python": "-> usr/bin/python3.12", "venv/pyvenv.cfg": "home = /usr/bin\n", "venv/lib/python3.12/site-packages/pip.py": "pass",
		"venv2/bin/python": "-> usr/bin/python3.12", "venv2/pyvenv.cfg": "include-system-site-packages = true\n", "venv2/lib64/python3.12/site-packages/pip.py": "pass",
	}
	app := func(names ...string) []string {
		for i := range names {
			names[i] = "app/" + names[i]
		}
		return names
	}
	always := []string{"etc/passwd", "usr/bin/python3.12", "lib64/ld-linux-x86-64.so.2", "usr/lib/python3.12/beside_stat.py",
		"usr/local/lib/python3.12/dist-packages/x.pth", "usr/local/lib/python3.12/dist-packages/stated.py", "usr/lib/python3.12/sitecustomize.py", "usr/lib/python3.12/custom.py"}
	for _, test := range []struct {
		name string
		c    Command
		want []string // without always
	}{
		{"a script", Command{Args: []string{"python3", "-u", "/app/main.py", "two"}}, slices.Concat(
			app("main.py", "__pycache__/one.cpython-312.pyc", "two/__init__.py", "two/five.py", "two/three.py", "two/four.py"),
			[]string{"usr/lib/python3.12/lib-dynload/_fast.cpython-312-x86_64-linux-gnu.so", "usr/lib/libfast.so"}, app("shadowed.py"))},
		{"by a shebang", Command{Args: []string{"roscmd"}}, []string{"opt/ros/noetic/bin/roscmd", "opt/ros/noetic/lib/python3/dist-packages/robot.py"}},
		{"a symlink", Command{Args: []string{"python3", "app/linked.py"}}, []string{"srv/linked/main.py", "srv/linked/near.py"}},
		{"in a circle", Command{Args: []string{"python3", "loop.py"}, Dir: "/app"}, app("loop.py", "loop_a.py", "loop_b.py")},
		{"packages that are only folders", Command{Args: []string{"python3", "/app/spaces.py"}, Env: []string{"PYTHONPATH=/none::/opt/lib"}}, append(app("spaces.py", "ns/a.py"), "opt/lib/ns/b.py")},
		{"kinds of files", Command{Args: []string{"python3", "/app/kinds.py"}}, app("kinds.py", "k1.so", "k2.abi3.so", "k3.cpython-312-x86_64-linux-gnu.so", "k5.pyc", "k6/__init__.cpython-312-x86_64-linux-gnu.so")},
		{"compiled imports", Command{Args: []string{"python3", "/app/c.py"}}, app("c.py", "cy/__init__.py", "cy/fast.so", "cy/other.py", "cy/_near.py", "cy/stat.py")},
		{"relative", Command{Args: []string{"python3", "/app/up.py"}}, app("up.py", "up1/__init__.py", "up1/up2/__init__.py", "up1/up2/up3.py", "up1/a.py", "up1/b.py")},
		{"a folder", Command{Args: []string{"python3", "/app/prog"}}, app("prog/__main__.py", "prog/helps.py")},
		{"-m of a package", Command{Args: []string{"python3", "-Wd", "-W", "d", "-um", "prog"}, Dir: "/app"}, slices.Concat([]string{"usr/lib/python3.12/importlib/__init__.py", "usr/lib/python3.12/beside_util.py"},
			app("prog/__main__.py", "prog/near.py"))},
		{"-m", Command{Args: []string{"python3", "-mmods.run"}, Dir: "/app"}, slices.Concat([]string{"usr/lib/python3.12/importlib/__init__.py", "usr/lib/python3.12/beside_util.py"},
			app("mods/__init__.py", "__pycache__/one.cpython-312.pyc", "two/__init__.py", "two/five.py", "two/three.py", "mods/run.py", "mods/near.py", "two/six.py"))},
		{"-c", Command{Args: []string{"python3", "-c", "import two.six; x()", "one.py"}, Dir: "/app"}, app("two/__init__.py", "two/five.py", "two/six.py", "one.py")},
		{"sites of Debian", Command{Args: []string{"python3", "/app/sites.py"}}, []string{"app/sites.py", "usr/lib/python3/dist-packages/deb.py", "usr/local/lib/python3.12/dist-packages/local.py",
			"usr/lib/python3.12/site-packages/pip.py", "srv/added/added.py", "usr/local/lib/python3.12/relative/rel.py", "root/.local/lib/python3.12/site-packages/user.py", "opt/ros/noetic/lib/python3/dist-packages/robot.py"}},
		{"another home", Command{Args: []string{"python3", "-c", "import user"}, Env: []string{"HOME=/home/x"}}, nil},
		{"standard input", Command{Args: []string{"python3", "-"}}, nil},
	} {
		t.Run(test.name, func(t *testing.T) {
			p, err := Of(t.Context(), image, test.c)
			if err != nil {
				t.Fatal(err)
			}
			got := slices.DeleteFunc(names(p), func(s string) bool { return slices.Contains(always, s) })
			if diff := cmp.Diff(slices.Concat(test.want), slices.Concat(got)); diff != "" {
				t.Errorf("files (-want +got):\n%s", diff)
			}
		})
	}
	for _, test := range []struct {
		name     string
		args     []string
		have     []string
		haveNone []string
	}{
		{"a virtual environment", []string{"/venv/bin/python", "/app/sites.py"}, []string{"venv/pyvenv.cfg", "venv/lib/python3.12/site-packages/pip.py"}, []string{"usr/lib/python3/dist-packages/deb.py", "root/.local/lib/python3.12/site-packages/user.py"}},
		{"one with the system's packages", []string{"/venv2/bin/python", "/app/sites.py"}, []string{"venv2/lib64/python3.12/site-packages/pip.py", "usr/lib/python3/dist-packages/deb.py"}, nil},
		{"before there were frozen modules", []string{"python3.10", "-V"}, []string{"usr/lib/python3.10/os.py", "usr/lib/python3.10/stat.py", "usr/lib/python3.10/site.py"}, nil},
		{"frozen modules", []string{"python3", "-V"}, always[3:4], []string{"usr/lib/python3.12/os.py", "usr/lib/python3.12/stat.py"}},
	} {
		p, err := Of(t.Context(), image, Command{Args: test.args})
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range test.have {
			if !slices.Contains(names(p), name) {
				t.Errorf("%s: %s is not in %q", test.name, name, names(p))
			}
		}
		for _, name := range test.haveNone {
			if slices.Contains(names(p), name) {
				t.Errorf("%s: %s is in it", test.name, name)
			}
		}
	}
}

// TestPythonBounds: a hostile image has many modules, large ones, and ones that import many.
func TestPythonBounds(t *testing.T) {
	wide, chain, deep := memory{}, memory{}, memory{"app/main.py": "import " + strings.Repeat("a.", maxName/2) + "a"}
	const many = 2*maxModules + maxImports
	for i := range many {
		wide[fmt.Sprintf("app/all%d.py", i/maxImports)] += fmt.Sprintf("import m%d\n", i)
		wide[fmt.Sprintf("app/m%d.py", i)] = "pass"
		chain[fmt.Sprintf("app/m%d.py", i)] = fmt.Sprintf("import m%d", i+1)
	}
	wide["app/main.py"] = "import all4, all3, all2, all1, all0\n"
	chain["app/main.py"] = "import m0"
	for i := 1; i < maxName/2; i++ {
		deep["app/"+strings.Repeat("a/", i)+"__init__.py"] = "pass"
	}
	filler := strings.Repeat("#", maxSource-100)
	large := memory{"app/main.py": "import first\n" + filler + filler[:100] + "\nimport beyond", "app/first.py": "pass", "app/beyond.py": "pass"}
	sources, each, much := maxSources/maxSource+10, "from . import below\n"+filler, memory{}
	for i := range sources {
		much[fmt.Sprintf("app/p%d/__init__.py", i)], much[fmt.Sprintf("app/p%d/below.py", i)] = each, "pass"
		much["app/main.py"] += fmt.Sprintf("import p%d\n", i)
	}
	for _, test := range []struct {
		name  string
		image memory
		files int // the program and the script among them
	}{
		{"wide", wide, 2 + maxModules}, {"chain", chain, 2 + maxModules}, {"deep", deep, 2 + maxName/2 - 1},
		{"large", large, 2 + 1}, {"much", much, 2 + sources + maxSources/len(each)},
	} {
		test.image["usr/bin/python3.12"], test.image["usr/lib/python3.12/os.py"] = "x", "pass"
		p, err := Of(t.Context(), test.image, Command{Args: []string{"python3.12", "/app/main.py"}})
		if err != nil {
			t.Fatal(err)
		}
		files := map[string]bool{}
		for _, x := range p.Pieces {
			files[x.Path] = true
		}
		if got := len(files); got > test.files || got < test.files-2 {
			t.Errorf("%s: %d files, not %d", test.name, got, test.files)
		}
	}
}

// slow is a tree that is far away.
type slow struct{ memory }

func (s slow) ReadAt(ctx context.Context, f File, p []byte, off int64) error {
	time.Sleep(time.Second)
	return s.memory.ReadAt(ctx, f, p, off)
}

// TestSideBySide: what does not depend on each other is read at the same time.
func TestSideBySide(t *testing.T) {
	const ld = "/lib64/ld-linux-x86-64.so.2"
	image := memory{"lib64/ld-linux-x86-64.so.2": program("", nil), "usr/lib/python3.12/os.py": "x"}
	var own []string
	for i := range readers {
		own = append(own, fmt.Sprintf("own%d.so", i))
		image["usr/lib/"+own[i]] = program("", nil)
		image["app/main.py"] += fmt.Sprintf("import s%d, l%d\n", i, i)
		image[fmt.Sprintf("app/s%d.py", i)] = "import deeper"
		image[fmt.Sprintf("app/l%d.so", i)] = program("", []string{fmt.Sprintf("lib%d.so", i)})
		image[fmt.Sprintf("usr/lib/lib%d.so", i)] = program("", []string{fmt.Sprintf("lower%d.so", i)})
		image[fmt.Sprintf("usr/lib/lower%d.so", i)] = program("", nil)
	}
	image["usr/bin/python3.12"] = program(ld, own)
	image["app/deeper.py"] = "import deepest"
	image["app/deepest.py"] = "x"
	synctest.Test(t, func(t *testing.T) {
		begin := time.Now()
		p, err := Of(t.Context(), slow{image}, Command{Args: []string{"python3.12", "/app/main.py"}})
		if err != nil {
			t.Fatal(err)
		}
		if n := len(names(p)); n != 5*readers+5 {
			t.Errorf("%d files", n)
		}
		// The program takes a read for each library that it names, and its libraries and the modules', on three levels, a few each; then there are four levels of modules.
		if rounds := time.Since(begin) / time.Second; rounds > 45 {
			t.Errorf("%d reads one after the other", rounds)
		}
	})
}

// TestImported shows that the modules of real programs are those that the Python of this machine imports.
func TestImported(t *testing.T) {
	out, err := exec.Command("python3", "-c", "import sys; print(sys.executable, sys.version_info[0])").Output()
	if fields := strings.Fields(string(out)); err != nil || len(fields) != 2 || fields[1] != "3" {
		t.Skip("no Python 3 here")
	} else if _, err := filepath.EvalSymlinks(fields[0]); err == nil {
		out = []byte(fields[0])
	}
	for _, text := range []string{
		"import json, email.message, http.client, logging.config, unittest",
		"import asyncio, concurrent.futures, sqlite3, xml.dom.minidom",
		"from multiprocessing import pool; import urllib.request, zipfile, argparse, tarfile",
	} {
		list, err := exec.Command(string(out), "-S", "-c", text+`
import sys
for m in list(sys.modules.values()):
    spec = getattr(m, "__spec__", None)
    if spec and spec.has_location and spec.origin not in ("frozen", "built-in") and getattr(m, "__file__", None): print(spec.cached or spec.origin)
`).Output()
		if err != nil {
			t.Logf("%s: %v", text, err)
			continue
		}
		p, err := Of(t.Context(), machine{}, Command{Args: []string{string(out), "-c", text}})
		if err != nil {
			t.Fatal(err)
		}
		have, want, there := names(p), strings.Fields(string(list)), 0
		for _, name := range want {
			if real, err := filepath.EvalSymlinks(name); err == nil && slices.Contains(have, real[1:]) {
				there++
			} else {
				t.Logf("%s: not %s", text, name)
			}
		}
		if len(want) < 30 || there < len(want)*9/10 || len(have) > 2*len(want) {
			t.Errorf("%s: %d of %d files; %d in all", text, there, len(want), len(have))
		}
	}
}
