package main

import (
	"path/filepath"

	"github.com/spf13/cobra"

	"lazuli/cmd/lazuli/internal/install"
)

func newInstallCommand(a *app) *cobra.Command {
	var o install.Options
	cmd := &cobra.Command{
		Use:   "install",
		Short: "Make this node's containerd use Lazuli",
		Long: `Install copies this program to /usr/local/bin, writes the systemd unit lazuli.service and a file beside containerd's configuration,
and starts the daemon. containerd then has a snapshotter lazuli; with --cri, Kubernetes' images use it, too. The rest
of containerd's configuration keeps its meaning: containerd is asked what it makes of the file before it is written.

Each change is printed when it is made. A second run changes nothing, and what cannot be finished is undone. lazuli uninstall takes it all back.
/etc/lazuli/config.toml is yours: it is neither written nor needed.`,
		Example: `  lazuli install --dry-run                  # look first
  lazuli install --restart                  # for ctr and nerdctl
  lazuli install --cri --restart            # for Kubernetes and crictl, too
  lazuli install --destdir ./rootfs         # into an image that is being made`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := a.installOptions(cmd, &o); err != nil {
				return err
			}
			return install.Install(cmd.Context(), cmd.OutOrStdout(), o)
		},
	}
	f := cmd.Flags()
	installFlags(cmd, &o)
	f.StringVar(&o.Bin, "bin", "/usr/local/bin", "`DIR` for this program, unless it runs from there or from /usr/bin")
	f.BoolVar(&o.CRI, "cri", false, "make Lazuli the snapshotter of Kubernetes' images")
	return cmd
}

func newUninstallCommand(a *app) *cobra.Command {
	var o install.Options
	cmd := &cobra.Command{
		Use:   "uninstall",
		Short: "Take back what lazuli install did",
		Long: `Uninstall stops the daemon, and removes what lazuli install wrote and made. What is here of images stays in the root folder unless --purge
is given. It refuses while root file systems of containers are mounted, unless --force is given: then those containers lose theirs.

containerd cannot use images that it pulled with Lazuli after that: remove them first, or pull them again.`,
		Example: `  lazuli uninstall --dry-run
  lazuli uninstall --restart
  lazuli uninstall --purge`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := a.installOptions(cmd, &o); err != nil {
				return err
			}
			return install.Uninstall(cmd.Context(), cmd.OutOrStdout(), o)
		},
	}
	f := cmd.Flags()
	installFlags(cmd, &o)
	f.BoolVar(&o.Force, "force", false, "also while containers run from it")
	f.BoolVar(&o.Purge, "purge", false, "remove the root folder, too")
	return cmd
}

// installFlags are the flags that install and uninstall share.
func installFlags(cmd *cobra.Command, o *install.Options) {
	f := cmd.Flags()
	f.StringVar(&o.DestDir, "destdir", "", "`DIR` stands for /: write everything below it, start nothing")
	f.BoolVar(&o.NoContainerd, "no-containerd", false, "leave containerd's configuration alone")
	f.BoolVar(&o.Restart, "restart", false, "restart containerd (containers go on running)")
	f.BoolVarP(&o.DryRun, "dry-run", "n", false, "print what would be done and written, and change nothing")
}

// installOptions completes o with the configuration. What the command line says of it, the daemon's says, too.
func (a *app) installOptions(cmd *cobra.Command, o *install.Options) error {
	for _, flag := range []struct{ name, value string }{{"root", a.Root}, {"config", a.file}} {
		path, err := filepath.Abs(flag.value)
		if err != nil {
			return err
		}
		if cmd.Flags().Changed(flag.name) {
			o.Args = append(o.Args, "--"+flag.name, path)
		}
		if flag.name == "root" {
			o.Root = path
		}
	}
	o.Socket = a.Socket
	return nil
}
