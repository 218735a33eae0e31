package integration

import (
	"bufio"
	"lazuli/integration/worst"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// stargzConvert converts layout with stargz-snapshotter's library and returns the new layout.
func stargzConvert(t testing.TB, layout string, options ...string) string {
	t.Helper()
	dst := filepath.Join(t.TempDir(), "converted")
	t.Log(strings.TrimSpace(peers(t, append(append([]string{"stargz-convert"}, options...), layout, dst)...)))
	return dst
}

// stargzMount mounts the image at ref with stargz-snapshotter's library until the test ends, and returns where.
// It is a [lazyMount].
func stargzMount(t testing.TB, ref string) string {
	t.Helper()
	needRoot(t)
	program, err := buildPeers()
	must(t, err)
	dir := t.TempDir()
	c := exec.Command(program, "stargz-mount", ref, dir)
	var stderr strings.Builder
	c.Stderr = &stderr
	out, err := c.StdoutPipe()
	must(t, err)
	must(t, c.Start())
	t.Cleanup(func() {
		c.Process.Signal(unix.SIGTERM)
		if err := c.Wait(); err != nil {
			t.Errorf("stargz-mount: %v\n%s", err, &stderr)
		}
	})
	if line, _ := bufio.NewReader(out).ReadString('\n'); line != "READY\n" {
		t.Fatalf("stargz-mount %s: %q\n%s", ref, line, &stderr)
	}
	return dir
}

// stargzFidelity shows that stargz-snapshotter's library mounts the image at ref with the content that containerd
// unpacks from layout.
func stargzFidelity(t testing.TB, layout string, img *worst.Image, ref string, rounded bool) {
	t.Helper()
	if img == nil {
		img = &worst.Image{Unknown: []string{""}}
	}
	want := containerd(t, layout)
	if rounded {
		want = roundTimes(want)
	}
	got, err := Snapshot(stargzMount(t, ref))
	must(t, err)
	differs := containerdDiffers(img)
	report(t, "containerd", Compare(want, got), func(d Difference) bool { return differs(d) || stargzDiffers(img)(d) })
}

// stargzDiffers returns which differences are those of stargz-snapshotter's file system: a directory that a layer
// has no entry for inherits nothing from the layers below, and a time of 0 is shown as one of the year 1, and
// an entry that comes twice counts as two links.
func stargzDiffers(img *worst.Image) func(Difference) bool {
	return func(d Difference) bool {
		return slices.Contains(img.Inherited, d.Path) && d.Field != "name" ||
			d.Field == "mtime" && d.A == (Time{}).String() && d.B == (Time{Sec: time.Time{}.Unix()}).String() ||
			d.Field == "nlink" && strings.HasPrefix(d.Path, "twice/again link")
	}
}

// TestStargz shows that stargz-snapshotter's library mounts what its converters make, which is what images
// converted here are held against.
func TestStargz(t *testing.T) {
	needRoot(t)
	layout, img := worstImage(t, worst.Options{Plain: true})
	for _, c := range stargzConversions {
		if c.name == grouped {
			// Its reader gives EIO now and then for files of several chunks that its converter grouped.
			continue
		}
		t.Run(c.name, func(t *testing.T) {
			ref := NewRegistry(t, RegistryOptions{}).Push(t, c.convert(t, layout), "stargz")
			stargzFidelity(t, layout, img, ref, true)
			skopeoPulls(t, ref)
		})
	}
}

// skopeoPulls shows that skopeo, whose code podman pulls with, takes the image at ref: digests, sizes and media types.
func skopeoPulls(t testing.TB, ref string) {
	t.Helper()
	needProgram(t, "skopeo")
	dir := t.TempDir()
	run(t, "skopeo", "--insecure-policy", "copy", "-q", "--src-tls-verify=false", "docker://"+ref, "oci:"+dir+":latest")
}

// TestStargzMountsOurs shows that stargz-snapshotter's library mounts what is converted here, with times to the
// nanosecond, and that skopeo takes it. The worst image is the plain one: not for the conversion's sake, but for what
// stargz's file system shows of names that are not UTF-8.
func TestStargzMountsOurs(t *testing.T) {
	needRoot(t)
	layout, img := worstImage(t, worst.Options{Plain: true})
	for _, c := range ourConversions {
		t.Run(c.name, func(t *testing.T) {
			ref := NewRegistry(t, RegistryOptions{}).Push(t, c.convert(t, layout), "ours")
			stargzFidelity(t, layout, img, ref, false)
			skopeoPulls(t, ref)
		})
	}
}
