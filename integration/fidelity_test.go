package integration

import (
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"lazuli/convert"
	"lazuli/integration/worst"
)

// A lazyMount mounts the image at ref, in a registry without TLS, and returns where. It is
// unmounted when the test ends.
type lazyMount func(t testing.TB, ref string) (dir string)

// A conversion makes a lazy image of the one in layout and returns the layout of that.
type conversion struct {
	name    string
	convert func(t testing.TB, layout string) string
	// limited is set for stargz-snapshotter's converter: it rounds times to seconds, and can take the
	// plain worst image only.
	limited bool
}

// notConverted is the image as it is; its layers are fetched whole.
var notConverted = conversion{"not converted", func(_ testing.TB, layout string) string { return layout }, false}

const grouped = "stargz, eStargz, small files together"

// stargzConversions are those of stargz-snapshotter's library.
var stargzConversions = []conversion{
	{"stargz, eStargz", func(t testing.TB, l string) string { return stargzConvert(t, l) }, true},
	{grouped, func(t testing.TB, l string) string { return stargzConvert(t, l, "-min-chunk-size", "50000") }, true},
	{"stargz, zstd:chunked", func(t testing.TB, l string) string { return stargzConvert(t, l, "-zstdchunked") }, true},
}

// testFidelity shows for every image and every conversion that what mount makes of it is what ordinary unpackers
// make of the original. In short mode the big ones are left out.
func testFidelity(t *testing.T, conversions []conversion, mount lazyMount) {
	needRoot(t)
	mounted := func(t *testing.T, c conversion, layout string) Tree {
		ref := NewRegistry(t, RegistryOptions{}).Push(t, c.convert(t, layout), "fidelity")
		tree, err := Snapshot(mount(t, ref))
		must(t, err)
		return tree
	}
	all := func(t *testing.T, layout string, img *worst.Image, limited bool) {
		for _, c := range conversions {
			if c.limited == limited {
				t.Run(c.name, func(t *testing.T) { fidelity(t, layout, img, mounted(t, c, layout), c.limited) })
			}
		}
	}
	t.Run("worst", func(t *testing.T) {
		layout, img := worstImage(t, worst.Options{})
		all(t, layout, img, false)
		layout, img = worstImage(t, worst.Options{Plain: true})
		all(t, layout, img, true)
	})
	t.Run("GNU sparse", func(t *testing.T) {
		layout, _ := worstImage(t, worst.Options{GNUSparse: true})
		for _, c := range conversions {
			if !c.limited {
				t.Run(c.name, func(t *testing.T) { gnuSparse(t, mounted(t, c, layout)) })
			}
		}
	})
	if testing.Short() {
		return
	}
	t.Run("worst and big", func(t *testing.T) {
		layout, img := worstImage(t, worst.Options{Many: true, Huge: true})
		all(t, layout, img, false)
	})
	t.Run("py", func(t *testing.T) {
		layout := debianImage(t, "py")
		all(t, layout, nil, false)
	})
}

// ourConversions are those of package convert.
var ourConversions = []conversion{
	{"eStargz", func(t testing.TB, l string) string { return convertLayout(t, l, convert.Options{}) }, false},
	{"zstd:chunked", func(t testing.TB, l string) string {
		return convertLayout(t, l, convert.Options{Format: convert.ZstdChunked})
	}, false},
}

// TestFidelity shows that a lazy root is the tree that ordinary unpackers make of the original image, whoever converted it.
func TestFidelity(t *testing.T) {
	conversions := slices.Concat([]conversion{notConverted}, ourConversions, stargzConversions)
	testFidelity(t, conversions, func(t testing.TB, ref string) string { return mountImage(t, ref).Dir })
}

// fidelity shows that got is the tree that containerd and umoci make of the image in layout. img is nil for an
// ordinary image.
func fidelity(t testing.TB, layout string, img *worst.Image, got Tree, rounded bool) {
	t.Helper()
	if img == nil {
		img = &worst.Image{Unknown: []string{""}}
	}
	adjust := func(tree Tree) Tree { return tree }
	if rounded {
		adjust = roundTimes
	}
	report(t, "containerd", Compare(adjust(containerd(t, layout)), got), containerdDiffers(img))
	report(t, "umoci", Compare(adjust(umoci(t, layout)), got), umociDiffers(img))
}

// roundTimes returns the tree with the times that stargz-snapshotter's converter leaves.
func roundTimes(tree Tree) Tree {
	rounded := make(Tree, len(tree))
	for name, n := range tree {
		n.MTime = Time{Sec: time.Unix(n.MTime.Sec, n.MTime.Nsec).Round(time.Second).Unix()}
		rounded[name] = n
	}
	return rounded
}

// gnuSparse shows that old GNU sparse files, which no unpacker takes, have the content of the same files in PAX form.
func gnuSparse(t testing.TB, got Tree) {
	t.Helper()
	count := 0
	for name, n := range got {
		if kind, ok := strings.CutPrefix(name, "sparse/gnu "); ok {
			count++
			if want := got["sparse/pax 1.0 "+kind]; n.SHA256 != want.SHA256 || n.Size != want.Size {
				t.Errorf("%s: %d bytes, want the same as PAX, %d", name, n.Size, want.Size)
			}
		}
	}
	if count != 6 {
		t.Errorf("%d old GNU sparse files, want 6", count)
	}
}

// report fails the test for each difference that is not expected.
func report(t testing.TB, who string, list []Difference, expected func(Difference) bool) {
	t.Helper()
	list = slices.DeleteFunc(slices.Clone(list), expected)
	for i, d := range list {
		if i == 50 {
			t.Errorf("%s: %d more", who, len(list)-i)
			return
		}
		t.Errorf("%s: %.1000s", who, d)
	}
}

// containerdDiffers returns which differences from containerd's tree are containerd's:
//   - it gives files from before 1970 the time 0 (pkg/archive: boundTime),
//   - directories that a layer has no entry for get the time of the unpacking.
//
// umoci has the first, and those directories that a lower layer names, as the tar says, so each field of each name is held
// against one of the two.
func containerdDiffers(img *worst.Image) func(Difference) bool {
	return func(d Difference) bool {
		return d.Field == "mtime" && (slices.Contains(img.Unknown, d.Path) || slices.Contains(img.Inherited, d.Path) ||
			d.A == (Time{}).String() && strings.HasPrefix(d.B, "-"))
	}
}

// umociDiffers returns which differences from umoci's tree are umoci's: it sets no xattr with an empty value; removing what comes twice
// in a tar changes the directory's time; and unpacking into one directory it does not count links that a higher layer hides, as overlayfs does.
func umociDiffers(img *worst.Image) func(Difference) bool {
	return func(d Difference) bool {
		switch d.Field {
		case "mtime":
			return slices.Contains(img.Unknown, d.Path) || d.Path == "twice"
		case "xattrs":
			return d.Path == "xattrs/empty"
		case "nlink":
			return slices.Contains(img.HiddenLinks, d.Path)
		}
		return false
	}
}

// worstImage writes the worst image into a directory of the test.
func worstImage(t testing.TB, o worst.Options) (layout string, img *worst.Image) {
	t.Helper()
	layout = t.TempDir()
	img, err := worst.Write(layout, o)
	must(t, err)
	return layout, img
}

// TestUnpackers shows that the two references agree on the worst image, where they are not known to differ, and
// that what they are known to differ in is there: else the image would not hold what it should.
func TestUnpackers(t *testing.T) {
	needRoot(t)
	layout, img := worstImage(t, worst.Options{})
	a, b := containerd(t, layout), umoci(t, layout)
	both := Compare(a, b)
	report(t, "containerd and umoci", both, func(d Difference) bool {
		return containerdDiffers(img)(d) || umociDiffers(img)(d)
	})
	old, empty := 0, 0
	for _, d := range both {
		if d.Field == "mtime" && strings.HasPrefix(d.B, "-") {
			old++
		}
		if d.Field == "xattrs" {
			empty++
		}
	}
	if old != 31 || empty != 1 || len(a) < 600 {
		t.Errorf("%d names, %d of them from before 1970, %d with an empty xattr; want over 600, 31, 1", len(a), old, empty)
	}
	for _, name := range img.HiddenLinks {
		if a[name].Nlink != 2 || b[name].Nlink != 1 {
			t.Errorf("%s: containerd counts %d links, umoci %d; want 2, 1", name, a[name].Nlink, b[name].Nlink)
		}
	}
	// What must be gone, and what must be there.
	for _, name := range []string{"white/file", "white/dir/old", "white/removed, added, removed", "opaque/entry/old",
		"change/dir-file-dir/old", "change/dir-link/old"} {
		if n, ok := a[name]; ok {
			t.Errorf("%s is there: %+v", name, n)
		}
	}
	for _, name := range []string{"white/removed, added", "white/dir", "opaque/entry/new", "opaque/entry/newer",
		"change/implied/old", "change/implied/new"} {
		if _, ok := a[name]; !ok {
			t.Errorf("%s is not there", name)
		}
	}
}

// TestLowerLinks shows that a hard link to a lower layer's file, which umoci follows and containerd's overlayfs
// snapshotter cannot, is refused by name.
func TestLowerLinks(t *testing.T) {
	needRoot(t)
	layout, _ := worstImage(t, worst.Options{LowerLinks: true})
	tree := umoci(t, layout)
	if n := tree["links/to a lower layer"]; n.Nlink != 2 || n.First != "links/to a lower layer" || n.SHA256 != tree["sizes/4097"].SHA256 {
		t.Errorf("%+v, want a second name of %+v", n, tree["sizes/4097"])
	}
	program, err := buildPeers()
	must(t, err)
	if out, err := exec.Command(program, "unpack", layout, filepath.Join(t.TempDir(), "x")).CombinedOutput(); err == nil || !strings.Contains(string(out), "layer 2") {
		t.Errorf("containerd: %v, %s", err, out)
	}
	refused(t, NewRegistry(t, RegistryOptions{}).Push(t, layout, "links"), t.TempDir(), "layer sha256:", `"links/to a lower layer"`, `"sizes/4097"`)
}
